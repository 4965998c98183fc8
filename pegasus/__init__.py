"""What the scripts of the top level are made of.

    cli, streams             command lines, what is said in the terminal
    files, device            files written whole, where to compute
    checkpoint               save and load a run
    data/                    CIFAR-10, STL-10, folders of pictures, the synthetic set
    models/                  variants of the VAE, flow prior, Gaussians, classifier,
                             the Pegasi that a prior learns from
    drawing/                 pictures from a checkpoint, sheets and curves
    training/                options of a run, its stages, its folder, its speed
    likelihoods, measures    what a model is measured by
    evaluate, paper, study, bench
                             tools: python -m pegasus.evaluate runs/pegasus/last.pt
"""
from pegasus import cli  # noqa: F401  # tells of a missing package in one sentence

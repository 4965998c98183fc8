"""Judge a checkpoint by numbers: bits/dim, Frechet distance, what its pictures are taken for, whether it copies.

    python evaluate.py runs/pegasus/last.pt                        # a table
    python evaluate.py runs/pegasus/last.pt --json                 # the same and the settings behind it, as JSON
    python evaluate.py runs/pegasus/last.pt --export 2000 folder   # 32 x 32 PNGs for other people's judges

It reports with judge 1; `sample.py --best` and the parts of Pegasi are chosen by judge 0.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import options
import cifar10
import judge
import pictures
import recipe
import reparam
import sample
import source
import vae
from options import Fault, option

import torch
from torch import Tensor

BOUND = 0  # purposes of the seeds derived from the one asked for
DRAWS = 1


@dataclass(frozen=True)
class Options:
    checkpoint: str = option("", "a checkpoint, as `make train` writes to runs/", positional=True)
    data: str = option("auto", "the data it was trained on, as for train.py; auto is the folder used then")
    mode: str = option("balanced", "what the Frechet distance and --export are of: balanced, as many draws of each "
                       "class's density, or prior, draws of the prior", choices=("balanced", "prior"))
    n: int = option(2000, "pictures to draw in each mode", least=200, most=65_536)
    guidance: float = option(2.0, "of the classes' and the Pegasi's own sets, with a learned prior; balanced has none; "
                             "other than 2.0 Pegasi are not composed", least=0.0)
    images: int = option(500, "test photographs for bits/dim", least=1)
    k: int = option(32, "posterior samples for each of them", least=1)
    judge_seed: int = option(1, "which judge reports; trained once, in minutes, and kept beside the data", least=0)
    seed: int = option(0, "decides everything drawn")
    threads: int = option(0, "CPU threads; 0 is torch's default, one a core", least=0, most=1024)
    json: bool = option(False, "print JSON")
    export: list[str] | None = option(None, "only write N PNGs to an empty folder", nargs=2, metavar=("N", "DIR"))


def binned(x: Tensor, xhat: Tensor, variance: Tensor) -> Tensor:
    """log P(bytes) in nats an image, (B,): N(xhat, variance) integrated over each byte's bin of 1/255.

    x: bytes / 255, (B, 3, 32, 32). The first and the last bin reach to infinity. Of an interval above the mean the
    mirror image is taken, since the difference of two numbers near one has no digits.
    """
    low, high = ((x + side / 510 - xhat) / variance.sqrt() for side in (-1, 1))
    low, high = low.masked_fill(x < 0.5 / 255, -math.inf), high.masked_fill(x > 254.5 / 255, math.inf)
    above = low > 0
    low, high = torch.where(above, -high, low), torch.where(above, -low, high)
    upper = torch.special.log_ndtr(high)
    return (upper + (-(torch.special.log_ndtr(low) - upper).expm1()).log()).flatten(1).sum(1)


@torch.no_grad()
def samples(model: vae.VAE, x: Tensor, k: int, seed: int = 0, likelihood=binned) -> tuple[Tensor, ...]:
    """k posterior samples of images (B, 3, 32, 32) in [0, 1], with noise that depends on (seed, number, row) alone.

    In nats, float64 (k, B): log p(x|z), or its expectation over the code; the bound with this sample, whose mean is the
    ELBO; log w, whose log-mean-exp is the importance-weighted bound, the same where there is no code. p(z) is N(0, I),
    or p(c) = 1/K and p(z|c) a Gaussian: then codes are summed out, elbo = sum_c q(c|x) [log w_c - log K q(c|x)], and
    w = sum_c w_c / K, since E w_c = p(x|c).
    """
    given, rows = model.given(x), []
    log_share = torch.stack([part.log_share for part in given]).double()  # (K, B)
    share, codes = log_share.exp(), math.log(len(given))
    for i in range(k):
        eps, known, weights = vae.noise(len(x), given[0].mu.shape[1], reparam.derive_seed(seed, i, BOUND)), [], []
        for part in given:
            z = part.mu + (part.logvar / 2).exp() * eps
            known.append(likelihood(x, part.decode(z), model.variance).double())
            # reflections change neither |z|, and so not p(z), nor volumes, and so not q(z|x)
            weights.append(known[-1] + (eps.square() - z.square() + part.logvar).double().sum(1) / 2)
        known, weights = torch.stack(known), torch.stack(weights)
        elbo = (share * (weights - log_share)).sum(0) - codes
        rows.append(((share * known).sum(0), elbo, weights.logsumexp(0) - codes))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def importance_weighted(weights: Tensor) -> Tensor:
    """log 1/K sum_k w_k, from log w (K, B) to (B,): a lower bound on log p(x) (Burda et al. 2016, equation 8)."""
    return weights.logsumexp(0) - math.log(len(weights))


def bounds(model: vae.VAE, images: Tensor, k: int, seed: int, batch_size: int = 100) -> dict[str, float]:
    """Bits for each byte by both bounds, rate and distortion in nats an image, of images (n, 3, 32, 32) of bytes."""
    rows = []
    for number, part in enumerate(images.split(batch_size)):
        x = vae.from_bytes(part)
        known, elbo, weights = samples(model, x, k, reparam.derive_seed(seed, number, BOUND))
        with torch.no_grad():
            rate = model(x, torch.tensor(0)).rate.double()
        rows.append(torch.stack([-elbo.mean(0), -importance_weighted(weights), rate, -known.mean(0)]))
    elbo, weighted, rate, distortion = torch.cat(rows, 1).mean(1).tolist()
    bits = vae.PIXELS * math.log(2)
    return {"bits_per_dim_elbo": elbo / bits, "bits_per_dim_iw": weighted / bits, "rate": rate,
            "distortion": distortion}


def draw_mode(found: sample.Trained, mode: str, n: int, seed: int, guidance: float) -> Tensor:
    """n images of a mode; another mode's noise is another."""
    number = [each for each in sample.modes(found) if each != "morph"].index(mode)
    return sample.draw(found, sample.Options(mode=mode, n=n, seed=reparam.derive_seed(seed, number, DRAWS),
                                             guidance=guidance))


def draw_balanced(found: sample.Trained, n: int, seed: int) -> Tensor:
    """n images in turn one of each class, without guidance."""
    each = math.ceil(n / len(found.classes))
    return balanced([draw_mode(found, name, each, seed, guidance=1.0) for name in found.classes], n)


def balanced(sets: list[Tensor], n: int) -> Tensor:
    """n rows in all, in turn one of each tensor."""
    return torch.stack([rows[:math.ceil(n / len(sets))] for rows in sets], 1).flatten(0, 1)[:n]


def nearest(features: Tensor, known: Tensor) -> float:
    """Median distance from a row of features (n, d) to the nearest of (m, d)."""
    return torch.cat([torch.cdist(part, known).amin(1) for part in features.split(500)]).median().item()


def called(probabilities: Tensor, classes: tuple[str, ...]) -> dict[str, float]:
    """The share of images that the judge calls each of some classes, and `other`."""
    winners = probabilities.argmax(1)
    shares = {name: (winners == cifar10.CLASSES.index(name)).double().mean().item() for name in classes}
    return shares | {"other": 1 - sum(shares.values())}


def turns(images: Tensor, labels: Tensor, n: int) -> Tensor:
    """The first images of each class in turn, n at most, as many of each: a file may hold one class after another."""
    sets = [images[labels == c] for c in labels.unique()]
    least = min(map(len, sets))
    return balanced([rows[:least] for rows in sets], min(n, least * len(sets)))


@torch.no_grad()
def impressions(found: sample.Trained, data: source.Pictures, classifier: judge.Judge, n: int, seed: int,
                guidance: float) -> dict[str, dict]:
    """What a judge makes of n pictures of each mode but `morph`, of the test photographs and of their reconstructions.

    `balanced`: of the classes in turn, without a learned prior's guidance; `guided`: with it. Returns dicts of set name
    to value: `called`, `pegasus_score` (mean) and `pegasus_share` (above 99 % of the test photographs), `frechet_of`
    to them, `nearest` (to a training photograph); `frechet_floor` is n photographs'.
    """
    test = vae.from_bytes(data.test_images)
    again = torch.cat([found.model.reconstruct(part) for part in test.split(500)])
    sets = {"photographs": test, "reconstructions": again}
    sets |= {mode: draw_mode(found, mode, n, seed, guidance) for mode in sample.modes(found) if mode != "morph"}
    turn = balanced([sets[name] for name in found.classes], n)
    sets |= {"balanced": draw_balanced(found, n, seed), "guided": turn} if found.learned else {"balanced": turn}
    seen = {name: judge.classify(classifier, images) for name, images in sets.items()}
    known, real = judge.classify(classifier, data.images)[1], seen["photographs"][1]
    shown = tuple(dict.fromkeys((*data.classes, *(("airplane",) if "bird" in data.classes else ()))))
    result = {"called": {name: called(p, shown) for name, (p, _) in seen.items()},
              "nearest": {name: nearest(features, known) for name, (_, features) in seen.items()},
              "frechet_of": {name: judge.frechet(features, real) for name, (_, features) in seen.items()
                             if name != "photographs"}, "pegasus_share": {}, "pegasus_score": {}}
    if len(data.classes) > 1:
        scores = {name: judge.pegasus_score(p, data.classes) for name, (p, _) in seen.items()}
        bar = scores["photographs"].quantile(0.99)
        result["pegasus_score"] = {name: score.mean().item() for name, score in scores.items()}
        result["pegasus_share"] = {name: (score > bar).double().mean().item() for name, score in scores.items()}
    return result | {"frechet_floor": judge.frechet(turns(known, data.labels, n), real)}


def check(data: source.Pictures) -> None:
    """Raise Fault for too few pictures to compare with, before a judge is trained for them."""
    if (least := min(len(data.images), len(data.test_images))) < 2:
        raise Fault(f"{data.folder}: {least} picture of {', '.join(data.classes)} to train on, or to test; the Frechet "
                    "distance needs two of each; use other data")


def report(found: sample.Trained, data: source.Pictures, state: dict, chosen: Options) -> dict:
    """All figures, under the names that --json gives them, and the settings behind each."""
    some = turns(data.test_images, data.test_labels, chosen.images)
    figures = bounds(found.model, some, chosen.k, chosen.seed)
    seen = impressions(found, data, judge.from_state(state), chosen.n, chosen.seed, chosen.guidance)
    pixel, codes = found.model.variance.item(), found.model.conditional
    prior = f"{len(codes.mean)} Gaussians" if codes else "N(0, I)"
    judged = {"n": chosen.n, "classes": list(data.classes), "test_photographs": len(data.test_images),
              "judge_seed": chosen.judge_seed, "guidance": chosen.guidance, "judge_accuracy": state["accuracy"]}
    settings = {"model": found.about, "data": data.folder, "seed": chosen.seed,
                "bits_per_dim": {"k": chosen.k, "images": len(some), "prior": prior, "pixel_variance": pixel},
                "frechet": judged | {"mode": chosen.mode, "floor_n": len(turns(data.labels, data.labels, chosen.n))},
                "called": judged, "pegasus_share": judged | {"above_quantile": 0.99}, "nearest": judged}
    return figures | {"frechet": seen["frechet_of"][chosen.mode], **seen, "settings": settings}


def table(figures: dict) -> str:
    """The report's figures for people."""
    settings, names = figures["settings"], list(figures["called"]["photographs"])
    bits, judged = settings["bits_per_dim"], settings["frechet"]
    lines = [f"bits/dim    {figures['bits_per_dim_elbo']:.3f} (ELBO), {figures['bits_per_dim_iw']:.3f} "
             f"(importance-weighted, K = {bits['k']}), {bits['images']} test photographs, under {bits['prior']}",
             f"nats        rate {figures['rate']:.1f}, distortion {figures['distortion']:.1f}",
             f"Frechet     {figures['frechet']:.2f} ({judged['mode']}, N = {judged['n']}), "
             f"{figures['frechet_floor']:.2f} for {judged['floor_n']} training photographs", "",
             f"{'':16}{'Frechet':>9}" + "".join(f"{name:>11}" for name in names) + f"{'Pegasus':>11}{'nearest':>9}"]
    for name, shares in figures["called"].items():
        distance = f"{figures['frechet_of'][name]:.2f}" if name in figures["frechet_of"] else ""
        like = f"{figures['pegasus_share'][name]:.1%}" if name in figures["pegasus_share"] else ""
        lines.append(f"{name:16}{distance:>9}" + "".join(f"{share:>11.1%}" for share in shares.values())
                     + f"{like:>11}{figures['nearest'][name]:>9.2f}")
    words = (f"Judge {judged['judge_seed']}, right about {judged['judge_accuracy']:.1%} of all test photographs: "
             "its Frechet distance to them (not FID), the share\nit calls each class, the share more Pegasus-like "
             "than 99 % of them, and in its features the distance to\nthe nearest training photograph.")
    return "\n".join([*lines, "", words])


def export(found: sample.Trained, chosen: Options) -> str:
    """Write N PNGs of 32 x 32, balanced in turn one of each class. Returns what was done. Raises Fault."""
    number, folder = options.number(int, least=1, most=65_536), Path(chosen.export[1])
    try:
        n = number(chosen.export[0])
    except options.argparse.ArgumentTypeError as error:
        raise Fault(f"--export: N: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.iterdir(), None):
        raise Fault(f"--export: {folder} is not empty; choose another folder")
    images = (draw_balanced(found, n, chosen.seed) if chosen.mode == "balanced" else
              draw_mode(found, chosen.mode, n, chosen.seed, chosen.guidance))
    for i, image in enumerate(images):
        pictures.save(pictures.sheet(image[None], 1, 1, 0), folder / f"{i:05}.png",
                      found.about | {"mode": chosen.mode, "seed": chosen.seed})
    return f"{n} pictures of {chosen.mode} in {folder}"


def main(argv: list[str] | None = None) -> None:
    chosen, _ = options.parse(Options, argv, __doc__)
    place = recipe.resolve(recipe.Options(threads=chosen.threads))
    torch.set_num_threads(place.threads)
    torch.set_flush_denormal(True)
    found = sample.load(Path(chosen.checkpoint))
    if chosen.export:
        print(export(found, chosen))
        return
    data = source.load(chosen.data, ",".join(found.classes), found.data)
    check(data)
    state = judge.get(Path(data.folder), chosen.judge_seed, place.device, place.precision)
    figures = report(found, data, state, chosen)
    print(json.dumps(figures, indent=2) if chosen.json else table(figures))


if __name__ == "__main__":
    options.run(main)

"""A run of both stages: the autoencoder, then the prior of its latents."""
import weakref
from dataclasses import replace
from pathlib import Path

import reparam
import sample
import train
import vae
from pegasus import checkpoint
from pegasus.cli import UserError
from pegasus.data import datasets
from pegasus.drawing import plots, sampler
from pegasus.drawing.sampler import SampleConfig
from pegasus.training import config as training_config
from pegasus.training import run_dir, stages
from pegasus.training.config import TrainConfig, first_stage_epochs, resume_config
from pegasus.training.distributed import Workers
from pegasus.training.run import Run
from pegasus.training.stages import Batch, PriorStage

import pytest
import torch
from conftest import IMAGE_SHAPE, IMAGE_VALUES, png, rows, same
from torch import Tensor

pytestmark = pytest.mark.usefixtures("small_network")
COMMAND = ("--batch-size", "50", "--latent", "8x8x2", "--threads", "1")


def train_stages(folder: Path, batches: Path, epochs: int, *argv: str) -> int:
    """Train one epoch of the autoencoder, the rest of the prior."""
    places = ("--run", str(folder), "--data", str(batches))
    lengths = ("--epochs", str(epochs), "--autoencoder-epochs", "1")
    return train.main([*places, *lengths, *COMMAND, *argv])


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory, small_network) -> Path:
    """An unbroken run: an epoch of the autoencoder, two of the prior."""
    folder = tmp_path_factory.mktemp("stages") / "a"
    assert train_stages(folder, batches, 3) == 0
    return folder


@pytest.fixture
def captions(monkeypatch) -> list[str]:
    """What is written below sheets from now on."""
    words = []
    caption = plots.caption

    def noting(image: object, text: str) -> object:
        words.append(text)
        return caption(image, text)

    monkeypatch.setattr(plots, "caption", noting)
    return words


# ---- batches ----


def test_orders_and_coins_are_functions_of_seed_and_epoch():
    order = stages.epoch_order(3, 7, 1000)
    assert order.equal(stages.epoch_order(3, 7, 1000))
    assert order.sort().values.equal(torch.arange(1000))
    assert not order.equal(stages.epoch_order(3, 8, 1000))
    assert not order.equal(stages.epoch_order(4, 7, 1000))
    coins = stages.epoch_flips(3, 7, 10_000)
    assert 4800 < coins.sum() < 5200
    assert coins[:500].equal(stages.epoch_flips(3, 7, 500))
    assert not coins.equal(stages.epoch_flips(3, 8, 10_000))


def test_gather_mirrors_and_scales():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    x = stages.gather(images, torch.tensor([4, 0]), torch.tensor([True, False]))
    assert x.equal(torch.stack([images[4].flip(2), images[0]]) / 255)
    assert stages.gather(images, torch.tensor([1]), None).equal(images[1:2] / 255)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert stages.gather(images, nothing, nothing.bool()).shape == (0, *IMAGE_SHAPE)


def test_a_process_gets_its_rows_of_a_batch():
    rows = torch.arange(10) * 3
    mirrored = rows % 2 == 0
    batch = Batch(rows, mirrored, 10, 0, torch.tensor([7]), torch.tensor(0.5))
    part = batch.part(slice(4, 7))
    assert part.rows.tolist() == [12, 15, 18]
    assert part.mirrored.tolist() == [True, False, True]
    assert (part.size, part.row_offset) == (10, 4)
    assert part.seeds is batch.seeds
    assert part.progress is batch.progress
    assert batch.rows is rows
    plain = batch._replace(mirrored=None).part(slice(10, 10))
    assert plain.mirrored is None
    assert len(plain.rows) == 0


def test_seeds_are_derived_from_seed_step_and_purpose():
    seeds = stages.derived_seeds(3, 9, (stages.TIME, stages.NOISE), "cpu")
    wanted = [reparam.derive_seed(3, 9, purpose) for purpose in (4, 2)]
    assert seeds.tolist() == wanted
    assert seeds.dtype == torch.int64


def make_run(batches: Path, folder: Path, state: dict, **change: object) -> Run:
    """Return a run in float32 that goes on from a checkpoint's state."""
    stored = TrainConfig(**state["config"])
    change = {"precision": "float32", "flip": True, "run": str(folder)} | change
    run = Run(replace(stored, **change), datasets.load(str(batches), "horse,bird"))
    run.restore(state)
    return run


def stage_gradients(
    stage: stages.AutoencoderStage | PriorStage, batch: Batch, shares: list[slice]
) -> list[Tensor]:
    """Return the sums, and the gradients, of a batch computed in parts."""
    sums = 0
    stage.network.zero_grad()
    for share in shares:
        loss, part = stage.loss(batch.part(share))
        loss.backward()
        sums = sums + part
    return [sums, *(p.grad.clone() for p in stage.network.parameters())]


@pytest.mark.parametrize("name", ["autoencoder", "prior"])
def test_rows_of_a_batch_may_be_computed_apart(run, batches, tmp_path, monkeypatch, name):
    """Rows 0 to 30, none, and 30 to 50 have together the gradients of all 50."""
    state = checkpoint.load(run / "last.pt")
    resumed = make_run(batches, tmp_path, state)
    workers = Workers("cpu")
    if name == "prior":
        stage = resumed.next_stage(workers)
    else:
        model = (resumed.config, resumed.data, resumed.model)
        stage = stages.AutoencoderStage(*model, workers)
    assert stage.name == name
    seeds = stages.derived_seeds(0, 7, stage.purposes, "cpu")
    mirrored = torch.arange(50) % 2 == 1
    batch = Batch(torch.arange(50) * 3, mirrored, 50, 0, seeds, torch.tensor(0.0))
    whole = stage_gradients(stage, batch, [slice(0, 50)])
    # squared errors of all processes together, as these would add them up
    monkeypatch.setattr(workers, "sum_", lambda tensor: whole[0][2].clone())
    shares = [slice(0, 30), slice(30, 30), slice(30, 50)]
    parts = stage_gradients(stage, batch, shares)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("progress", "beta"), [(0.0, 0.0), (0.05, 0.1), (0.25, 0.5), (1, 0.5)])
def test_the_autoencoders_loss_is_its_objective(run, batches, tmp_path, progress, beta):
    """Distortion at the batch's own variance plus beta times the rate, a mean an image.

    Beta rises over the first quarter of the stage.
    """
    state = checkpoint.load(run / "last.pt")
    resumed = make_run(batches, tmp_path, state, beta=0.5)
    model = resumed.model
    stage = stages.AutoencoderStage(resumed.config, resumed.data, model, Workers("cpu"))
    rows = torch.tensor([5, 9, 70])
    batch = Batch(rows, None, 3, 0, torch.tensor([4]), torch.tensor(progress))
    loss, sums = stage.loss(batch)
    terms = model(resumed.data.images[rows] / 255, torch.tensor(4))
    variance = terms.sse.mean() / IMAGE_VALUES
    nll = vae.gaussian_nll(terms.sse, variance, IMAGE_VALUES)
    torch.testing.assert_close(loss, (nll + beta * terms.rate).mean())
    wanted = torch.stack([nll.sum(), terms.rate.sum(), terms.sse.sum()])
    torch.testing.assert_close(sums, wanted)
    assert not sums.requires_grad


def test_posteriors_are_those_of_images_and_their_mirror_images(run, batches, tmp_path):
    state = checkpoint.load(run / "last.pt")
    resumed = make_run(batches, tmp_path, state)
    images = resumed.data.images[:130]
    parts = (images[:5], images[5:])
    both = stages.encode_all(resumed.model, parts, resumed.config, True)
    assert (both.shape, both.dtype) == ((2, 260, 128), torch.half)
    x = vae.from_bytes(images)
    with torch.no_grad():
        for first, view in ((0, x), (130, x.flip(3))):
            posterior = torch.stack(resumed.model.encode(view))
            part = both[:, first : first + 130].float()
            torch.testing.assert_close(part, posterior, rtol=2e-3, atol=2e-3)
    plain = stages.encode_all(resumed.model, parts, resumed.config)
    assert plain.equal(both[:, :130])


# ---- runs ----


def test_the_log_says_which_stage(run):
    table = rows(run / "log.csv")
    assert [row["phase"] for row in table] == ["autoencoder", "prior", "prior"]
    assert table[0]["bits_per_dim"] and not table[1]["bits_per_dim"]
    assert 0.02 < float(table[2]["test_loss"]) < 0.5
    assert png(run / "curves.png")[0][1] > 1200


@pytest.mark.parametrize(("step", "done"), [(3, (0, 3)), (4, (1, 0)), (5, (2, 1))])
def test_stopped_anywhere_a_run_goes_on_to_the_same_bits(
    run, batches, tmp_path, stop_at, capsys, step, done
):
    """Also at the last of the autoencoder's four steps, and within an epoch of the prior."""
    stop_at(step)
    assert train_stages(tmp_path / "b", batches, 3) == 128 + 15
    state = checkpoint.load(tmp_path / "b" / "last.pt")
    assert (state["epochs_done"], state["step"]) == done
    stop_at(None)
    assert train_stages(tmp_path / "b", batches, 3, "--resume") == 0
    said = capsys.readouterr().out
    assert said.count("192 pictures (horse, bird)") == 2
    assert "then stopped; --resume goes on" in said
    same(run, tmp_path / "b")


def test_pegasi_of_a_run_that_is_under_way_are_previews_and_say_so(
    batches, tmp_path, monkeypatch, captions
):
    about = []
    draw_pictures = run_dir.draw_pictures

    def watching(folder: Path, *args: object) -> None:
        draw_pictures(folder, *args)
        about.append(png(folder / "pegasus.png")[1]["prior"])

    monkeypatch.setattr(run_dir, "draw_pictures", watching)
    places = ["--run", str(tmp_path), "--data", str(batches)]
    assert train.main([*places, "--epochs", "5", "--save-seconds", "0", *COMMAND]) == 0
    stages_of_a_run = [sampler.UNTRAINED, sampler.PREVIEW, "learned"]
    assert list(dict.fromkeys(about)) == stages_of_a_run
    assert about == sorted(about, key=stages_of_a_run.index)
    assert captions.count(sampler.PREVIEW) == about.count(sampler.PREVIEW)
    # below samples too
    assert captions.count(sampler.UNTRAINED) == 2 * about.count(sampler.UNTRAINED)


def test_the_prior_is_trained_without_the_runs_photographs(batches, tmp_path, monkeypatch):
    """They would not fit beside each other into the memory that is promised."""
    images = []
    left = []
    load = datasets.load
    loss = PriorStage.loss

    def watched(*args: object) -> datasets.Dataset:
        data = load(*args)
        images.append(weakref.ref(data.images))
        return data

    def noting(*args: object) -> tuple[Tensor, Tensor]:
        left.append(images[0]())
        return loss(*args)

    monkeypatch.setattr(datasets, "load", watched)
    monkeypatch.setattr(PriorStage, "loss", noting)
    assert train_stages(tmp_path / "r", batches, 2, "--save-seconds", "0") == 0
    assert len(left) > 1
    assert all(tensor is None for tensor in left)


def test_sheets_before_the_prior_say_so(batches, tmp_path, captions):
    places = ["--run", str(tmp_path), "--data", str(batches)]
    assert train.main([*places, "--epochs", "1", *COMMAND]) == 0
    assert captions.count(sampler.UNTRAINED) == 2  # samples and Pegasi
    assert png(tmp_path / "pegasus.png")[1]["prior"] == sampler.UNTRAINED
    assert "prior" not in png(tmp_path / "reconstructions.png")[1]  # which need none
    loaded = sampler.load(tmp_path / "last.pt")
    assert loaded.prior is None
    z = sampler.latents(loaded, SampleConfig(mode="prior", n=6, temperature=0.0))
    for first, name in enumerate(("horse", "bird")):
        assert z[first::2].allclose(loaded.gaussians[name].mean)


def test_a_run_begun_without_a_prior_learns_one_when_asked_for_more(batches, tmp_path):
    places = ["--run", str(tmp_path), "--data", str(batches)]
    assert train.main([*places, "--epochs", "1", *COMMAND]) == 0
    assert checkpoint.load(tmp_path / "last.pt")["phase"] == "autoencoder"
    assert train.main([*places, "--epochs", "2", "--resume", *COMMAND]) == 0
    assert sampler.load(tmp_path / "last.pt").prior is not None
    assert checkpoint.load(tmp_path / "last.pt")["phase"] == PriorStage.name


def test_a_small_checkpoint_samples_nearly_the_same(run, tmp_path, complaint):
    small = tmp_path / "last.pt"
    checkpoint.main([str(run / "last.pt"), str(small)])
    assert small.stat().st_size < (run / "last.pt").stat().st_size * 0.4
    assert str(run.parent.parent).encode() not in small.read_bytes()
    config = SampleConfig(n=4, steps=4)
    images = sampler.sample(sampler.load(run / "last.pt"), config)
    again = sampler.sample(sampler.load(small), config)
    assert (again - images).abs().mean() < 0.02
    refused = complaint(train.main, "--run", tmp_path, "--resume")
    assert "a small checkpoint, which only draws" in refused
    out = tmp_path / "o.png"
    sample.main([str(small), str(out), "--mode", "horse", "--n", "6", "--best", "3"])
    assert png(out)[1]["best"] == "of 6 by judge 0"
    itself = (run / "last.pt", run / "last.pt")
    assert "is the checkpoint itself" in complaint(checkpoint.main, *itself)


def test_what_has_no_learned_prior_stays_as_it_is(batches, tmp_path, complaint):
    places = ["--run", str(tmp_path / "r"), "--data", str(batches)]
    train.main([*places, "--epochs", "1", "--arch", "mlp"])
    last = tmp_path / "r" / "last.pt"
    out = tmp_path / "small.pt"
    assert "has no learned prior" in complaint(checkpoint.main, last, out)
    argv = ("--run", tmp_path / "q", "--arch", "mlp", "--prior", "learned")
    assert "--prior: learned needs" in complaint(train.main, *argv)


def test_a_run_goes_on_with_the_composites_it_was_begun_with(run, tmp_path, complaint):
    """Another machine could rank them otherwise, and take none."""
    state = checkpoint.load(run / "last.pt")
    assert state["composites"] > 0
    checkpoint.save(tmp_path / "last.pt", state | {"composites": 0})
    said = complaint(train.main, "--run", tmp_path, "--resume", "--epochs", 4)
    assert "begun with 0 composites, and here the same photographs give" in said


def test_one_class_has_no_pegasi(batches, tmp_path, complaint):
    places = ["--run", str(tmp_path), "--data", str(batches), "--classes", "horse"]
    assert train.main([*places, "--epochs", "2", *COMMAND]) == 0
    assert checkpoint.load(tmp_path / "last.pt")["composites"] == 0
    out = tmp_path / "o.png"
    sample.main([str(tmp_path / "last.pt"), str(out), "--mode", "horse", "--n", "2"])
    assert "wanted one of horse, prior" in complaint(sample.main, tmp_path / "last.pt", out)


def test_a_batch_of_more_than_there_is(batches, tmp_path):
    places = ("--run", str(tmp_path / "r"), "--data", str(batches))
    argv = (*places, "--epochs", "2", *COMMAND, "--batch-size", str(10**12))
    assert train.main(argv) == 0


# ---- options ----


def test_how_epochs_are_split_by_default():
    shares = [training_config.default_split(n) for n in (1, 2, 30, 60, 100, 150, 300)]
    assert shares == [1, 1, 6, 8, 8, 8, 8]
    resolved = training_config.resolve(TrainConfig(epochs=300))
    assert first_stage_epochs(resolved) == 8
    assert first_stage_epochs(training_config.resolve(TrainConfig(epochs=9, arch="mlp"))) == 9
    both = TrainConfig(epochs=5, autoencoder_epochs=9)
    assert first_stage_epochs(training_config.resolve(both)) == 5


def test_how_epochs_of_a_resumed_run_are_split(run):
    """Until the autoencoder is done its share follows --epochs, later it stays.

    Asked for, it is kept.
    """
    def parts(state: dict, **given: int) -> tuple[int, int]:
        config = resume_config(TrainConfig(**given), set(given), state)
        return first_stage_epochs(config), config.epochs

    state = checkpoint.load(run / "last.pt")
    assert parts(state, epochs=300) == (1, 300)
    lengths = {"epochs": 300, "autoencoder_epochs": 8}
    config = {"config": state["config"] | lengths}
    early = state | {"phase": "autoencoder", "epochs_done": 3} | config
    assert parts(early) == (8, 300)
    assert parts(early, epochs=20) == (4, 20)
    assert parts(early, epochs=30, autoencoder_epochs=8) == (8, 30)
    late = early | {"epochs_done": 5, "step": 1}
    assert parts(late, epochs=20) == (6, 20)  # not back to before
    with pytest.raises(UserError, match="--epochs: got 5, but .* has begun epoch 6"):
        parts(late, epochs=5)
    asked = early | {"config": early["config"] | {"autoencoder_epochs": 100}}
    assert parts(asked, epochs=400) == (100, 400)


def test_a_run_of_one_stage_has_no_epochs_of_another(tmp_path, complaint):
    argv = ("--run", tmp_path / "r", "--arch", "mlp", "--autoencoder-epochs", 3)
    sentence = complaint(train.main, *argv)
    assert "--autoencoder-epochs: only a run with" in sentence


def test_a_run_goes_on_where_there_is_another_device(run):
    state = checkpoint.load(run / "last.pt")
    elsewhere = state | {"config": state["config"] | {"device": "cuda"}}
    config = resume_config(TrainConfig(device="cpu"), {"device"}, elsewhere)
    assert config.device == "cpu"
    assert resume_config(TrainConfig(), set(), elsewhere).device == "cpu"


def test_a_run_keeps_the_precision_it_began_with(run):
    state = checkpoint.load(run / "last.pt")
    for precision in ("float32", "bfloat16"):
        stored = state | {"config": state["config"] | {"precision": precision}}
        config = resume_config(TrainConfig(), {"precision"}, stored)
        assert config.precision == precision
    other = TrainConfig(precision="float32")
    with pytest.raises(UserError, match="--precision: got float32"):
        resume_config(other, {"precision"}, stored)


def test_each_row_of_photographs_stands_above_its_reconstructions(batches):
    model = vae.VAE()
    preview = run_dir.preview_data(datasets.load(str(batches), "horse,bird"))
    with torch.no_grad():
        pairs = run_dir.reconstruction_pairs(model, preview)
        again = model.reconstruct(vae.from_bytes(preview.test_images))
    photographs = preview.test_images / 255
    assert pairs.shape == (64, 3, 32, 32)
    for row in range(4):
        images = slice(8 * row, 8 * row + 8)
        torch.testing.assert_close(pairs[16 * row : 16 * row + 8], photographs[images])
        torch.testing.assert_close(pairs[16 * row + 8 : 16 * row + 16], again[images])

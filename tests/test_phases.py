"""A run of both phases through its command lines: autoencoder, then learned prior."""
import csv
import weakref
from dataclasses import replace
from pathlib import Path

import checkpoint
import compose
import phases
import pictures
import sample
import train
from options import Fault

import pytest
import torch
from conftest import png

pytestmark = pytest.mark.usefixtures("small_network")
COMMAND = ("--batch-size", "50", "--latent", "8x8x2", "--no-judge", "--threads", "1")


def trained(folder: Path, batches: Path, epochs: int, *more: str) -> int:
    return train.main(["--run", str(folder), "--data", str(batches), "--epochs", str(epochs),
                       "--autoencoder-epochs", "1", *COMMAND, *more])


@pytest.fixture(scope="module")
def run(batches, tmp_path_factory, small_network) -> Path:
    """An unbroken run: an epoch of the autoencoder, two of the prior."""
    folder = tmp_path_factory.mktemp("phases") / "a"
    assert trained(folder, batches, 3) == 0
    return folder


def test_the_log_says_which_phase(run):
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    assert [row["phase"] for row in rows] == ["autoencoder", "prior", "prior"]
    assert rows[0]["bits_per_dim"] and not rows[1]["bits_per_dim"]
    assert 0.5 < float(rows[2]["test_loss"]) < 3  # a velocity of zero has 2
    assert png(run / "curves.png")[0][1] > 1200


@pytest.mark.parametrize("step", [3, 4, 5, 10])
def test_stopped_anywhere_a_run_goes_on_to_the_same_bits(run, batches, tmp_path, monkeypatch, capsys, step):
    """Also at the last step of the autoencoder's epoch (4) and after the first of the prior's."""
    ours = train.Training.train_step

    def stopping(self, *args):
        ours(self, *args)
        if self.epoch * self.steps + self.step == step:
            self.stop = 15
    monkeypatch.setattr(train.Training, "train_step", stopping)
    assert trained(tmp_path / "b", batches, 3) == 128 + 15
    monkeypatch.setattr(train.Training, "train_step", ours)
    assert trained(tmp_path / "b", batches, 3, "--resume") == 0
    assert capsys.readouterr().out.count("192 pictures (horse, bird)") == 2
    one, two = checkpoint.load(run / "last.pt"), checkpoint.load(tmp_path / "b" / "last.pt")
    for part in ("model", "prior", "velocity"):
        assert all(tensor.equal(two[part][name]) for name, tensor in one[part].items()), part
    for i, moments in one["optimizer"]["state"].items():
        assert all(moment.equal(two["optimizer"]["state"][i][name]) for name, moment in moments.items())
    for name in ("log.csv", "curves.png", "pegasus.png", "samples.png"):
        assert (run / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_rows_of_a_batch_may_be_computed_apart(run, batches, tmp_path):
    """The gradients of a batch are those of its rows 0 to 30 and 30 to 50 and of none together."""
    state = checkpoint.load(run / "last.pt")
    chosen = train.replace(train.Options(**state["config"]), precision="float32", run=str(tmp_path))
    training = train.Training(chosen, train.source.load(str(batches), "horse,bird"), state, train.Group("cpu"))
    rows, mirrored, found = torch.arange(50) * 3, torch.arange(50) % 2 == 1, []
    rest = phases.purpose_seeds(chosen, 7, *training.phase.purposes), torch.tensor(0.0)
    for shares in ([slice(0, 50)], [slice(0, 30), slice(30, 30), slice(30, 50)]):
        training.optimizer.zero_grad()
        sums = sum(training.phase.backward(rows[s], mirrored[s], 50, s.start, *rest) for s in shares)
        found.append([sums, *(p.grad for p in training.optimizer.trained.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_pegasi_of_a_run_that_is_under_way_are_joined_and_say_so(batches, tmp_path, monkeypatch):
    words, caption, about = [], pictures.caption, []
    monkeypatch.setattr(pictures, "caption", lambda image, text: words.append(text) or caption(image, text))
    ours = train.folder.draw
    monkeypatch.setattr(train.folder, "draw", lambda where, *args: ours(where, *args) or about.append(
        png(where / "pegasus.png")[1]["prior"]))
    argv = ["--run", str(tmp_path), "--data", str(batches), "--epochs", "2", "--save-seconds", "0", *COMMAND]
    assert train.main(argv) == 0
    assert about == [sample.JOINED] * (len(about) - 1) + ["learned"] and len(about) > 2
    assert words.count(sample.JOINED) == len(about) - 1
    assert words.count(sample.BEFORE) < len(about) - 1  # samples, until the prior is trained


def test_prior_and_judge_train_without_the_runs_photographs(batches, tmp_path, monkeypatch):
    """They would not fit beside each other into the memory that is promised."""
    images, load, backward, left = [], train.source.load, phases.Prior.backward, []

    def watched(*argv):
        data = load(*argv)
        images.append(weakref.ref(data.images))
        return data

    def get(*_):
        left.append(images[0]())
        raise Fault("seen enough")
    monkeypatch.setattr(train.source, "load", watched)
    monkeypatch.setattr(phases.Prior, "backward", lambda *args: left.append(images[0]()) or backward(*args))
    monkeypatch.setattr(train.judge, "get", get)
    with pytest.raises(Fault, match="seen enough"):
        trained(tmp_path / "r", batches, 2, "--judge", "--save-seconds", "0")
    assert len(left) > 2 and not any(each is not None for each in left)


def test_sheets_before_the_prior_say_so(batches, tmp_path, monkeypatch):
    words, caption = [], pictures.caption
    monkeypatch.setattr(pictures, "caption", lambda image, text: words.append(text) or caption(image, text))
    assert train.main(["--run", str(tmp_path / "r"), "--data", str(batches), "--epochs", "1", *COMMAND]) == 0
    assert words.count(sample.BEFORE) == 2  # samples and Pegasi; reconstructions need no prior
    assert png(tmp_path / "r" / "pegasus.png")[1]["prior"] == sample.BEFORE
    found = sample.load(tmp_path / "r" / "last.pt")
    z = sample.latents(found, sample.Options(mode="prior", n=6, temperature=0.0))
    assert z[::2].allclose(found.densities["horse"].mean) and z[1::2].allclose(found.densities["bird"].mean)


@pytest.mark.parametrize("mode", ["pegasus", "morph", "horse", "bird", "prior"])
def test_modes_and_that_picture_i_depends_on_seed_and_i_alone(run, mode):
    found = sample.load(run / "last.pt")
    options = {"mode": mode, "steps": 3, "columns": 4}
    z = sample.latents(found, sample.Options(n=70, seed=3, **options))
    assert z.shape == (70, 128) and z.isfinite().all()
    again = sample.latents(found, sample.Options(n=8, seed=3, **options))
    exact = torch.backends.mkl.is_available()  # other libraries' products may depend on their size
    assert z[:8].equal(again) if exact else z[:8].allclose(again, rtol=0, atol=0.05)
    assert not z.equal(sample.latents(found, sample.Options(n=70, seed=4, **options)))


def test_how_much_of_each_class_the_flow_follows(run):
    found = sample.load(run / "last.pt")
    for given, wanted in ((dict(mode="bird"), {1: 2.0}), (dict(mode="horse", coat="dark", guidance=1.5), {3: 1.5}),
                          (dict(mode="prior"), {}), (dict(blend=0.75, guidance=4.0, coat="white"), {2: 6.0, 1: 2.0})):
        assert sample.weights(found, sample.Options(**given)) == wanted
    morph = sample.weights(found, sample.Options(mode="morph", n=4, columns=3))
    assert {name: w.flatten().tolist() for name, w in morph.items()} == {0: [2, 1, 0, 2], 1: [0, 1, 2, 0]}


def test_guidance_and_coat_change_the_flow(run):
    found = sample.load(run / "last.pt")
    state = found.learned.state_dict()
    for name, tensor in state.items():  # barely trained, all classes are alike
        if name.startswith("average.") and tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    sets = [sample.latents(found, sample.Options(mode="horse", n=2, steps=2, **more)) for more in (
        {}, {"guidance": 4.0}, {"coat": "white"}, {"coat": "dark"})]
    assert all(not a.allclose(b, atol=1e-4) for i, a in enumerate(sets) for b in sets[:i])


def test_a_small_checkpoint_draws_nearly_the_same(run, tmp_path, complaint):
    small = tmp_path / "last.pt"
    checkpoint.main([str(run / "last.pt"), str(small)])
    assert small.stat().st_size < (run / "last.pt").stat().st_size * 0.4
    assert str(run.parent.parent).encode() not in small.read_bytes()
    found, options = sample.load(small), sample.Options(n=4, steps=4)
    images = sample.draw(sample.load(run / "last.pt"), options)
    assert (sample.draw(found, options) - images).abs().mean() < 0.02
    assert "a small checkpoint, which only draws" in complaint(train.main, "--run", tmp_path, "--resume")
    assert "has no judge" in complaint(sample.main, small, tmp_path / "o.png", "--best", 3)
    assert "is the checkpoint itself" in complaint(checkpoint.main, run / "last.pt", run / "last.pt")


def test_how_epochs_are_split(run, tmp_path, complaint):
    """A fifth, or up to 20 a third: until it is done it follows --epochs, later it stays; asked for, it is kept."""
    def parts(given: dict, state: dict | None) -> tuple[int, int]:
        chosen = train.recipe.settle(train.Options(**given), set(given), state)
        return train.recipe.split(chosen), chosen.epochs
    state = checkpoint.load(run / "last.pt")
    assert parts({"epochs": 300}, None) == (60, 300)
    assert [parts({"epochs": n}, None)[0] for n in (1, 2, 30, 60, 100, 150)] == [1, 1, 10, 20, 20, 30]
    assert parts({"epochs": 5, "autoencoder_epochs": 9}, None) == (5, 5)
    assert parts({"epochs": 9, "arch": "mlp"}, None) == (9, 9)
    assert parts({"epochs": 300}, state) == (1, 300)
    early = state | {"phase": "autoencoder", "epochs_done": 3, "config": state["config"] | {
        "epochs": 300, "autoencoder_epochs": 60}}
    assert parts({}, early) == (60, 300)
    assert parts({"epochs": 100}, early) == (20, 100)
    assert parts({"epochs": 100, "autoencoder_epochs": 60}, early) == (60, 100)
    assert parts({"epochs": 100}, early | {"epochs_done": 50, "step": 1}) == (51, 100)  # not back to before
    with pytest.raises(train.Fault, match="--epochs: got 50, but .* has begun epoch 51"):
        parts({"epochs": 50}, early | {"epochs_done": 50, "step": 1})
    asked = early | {"config": early["config"] | {"autoencoder_epochs": 100}}
    assert parts({"epochs": 400}, asked) == (100, 400)
    assert "--autoencoder-epochs: only a run with" in complaint(
        train.main, "--run", tmp_path / "r", "--arch", "mlp", "--autoencoder-epochs", 3)


def test_a_run_goes_on_where_there_is_another_device(run):
    state = checkpoint.load(run / "last.pt")
    elsewhere = state | {"config": state["config"] | {"device": "cuda"}}
    chosen = train.recipe.settle(train.Options(device="cpu"), {"device"}, elsewhere)
    assert chosen.device == "cpu"
    assert train.recipe.settle(train.Options(), set(), elsewhere).device == train.recipe.device(train.Options())


def test_what_has_no_learned_prior_stays_as_it_is(batches, tmp_path, complaint):
    train.main(["--run", str(tmp_path / "r"), "--data", str(batches), "--epochs", "1", "--arch", "mlp", "--no-judge"])
    last = tmp_path / "r" / "last.pt"
    assert "has no learned prior" in complaint(checkpoint.main, last, tmp_path / "s.pt")
    assert "--from: this model has no learned prior" in complaint(sample.main, last, tmp_path / "o.png", "--from", last)
    assert "--prior: learned needs" in complaint(train.main, "--run", tmp_path / "q", "--arch", "mlp", "--prior",
                                                 "learned")


def test_begin_from_a_picture(run, tmp_path, complaint):
    """Kept whole it comes back as the autoencoder sees it; a file that is none is refused."""
    found, photo = sample.load(run / "last.pt"), tmp_path / "photo.png"
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    pictures.save(pictures.sheet(picture, 1, 1, 0), photo, {})
    assert pictures.read(photo).allclose(picture, atol=1 / 255)
    again = sample.draw(found, sample.Options(mode="horse", n=1, from_=str(photo), keep=1.0))
    with torch.no_grad():
        assert again.allclose(found.model.reconstruct(pictures.read(photo)), atol=1e-3)
    (tmp_path / "text.png").write_text("no picture")
    out = tmp_path / "o.png"
    assert "text.png: not a picture" in complaint(sample.main, run / "last.pt", out, "--from", tmp_path / "text.png")
    assert "none.png: no such file" in complaint(sample.main, run / "last.pt", out, "--from", tmp_path / "none.png")


def test_parts_for_pegasi_come_at_the_end_and_are_drawn_from(batches, tmp_path, monkeypatch):
    whole = compose.prepare
    monkeypatch.setattr(compose, "prepare", lambda *args: whole(*args, draws=36, horses=3, birds=4))
    argv = [word for word in COMMAND if word != "--no-judge"]
    assert train.main(["--run", str(tmp_path), "--data", str(batches), "--epochs", "2", *argv]) == 0
    found = sample.load(tmp_path / "last.pt")
    assert {name: len(parts) for name, parts in found.bank.items()} == {"any": 3, "white": 3, "dark": 3, "birds": 4}
    chosen = sample.Options(n=4, seed=2, steps=8)
    z = compose.pegasus(found.model, found.learned, found.bank, 4, 2, 0, steps=8)
    assert sample.latents(found, chosen).equal(z)
    photo = tmp_path / "photo.png"
    pictures.save(pictures.sheet(torch.rand(1, 3, 32, 32), 1, 1, 0), photo, {})
    own = compose.pegasus(found.model, found.learned, found.bank, 4, 2, 0, 8, pictures.read(photo))
    assert sample.latents(found, replace(chosen, from_=str(photo))).equal(own)
    assert not sample.latents(found, replace(chosen, from_=str(photo), keep=0.5)).allclose(own, atol=1e-3)
    assert not sample.latents(found, replace(chosen, composed=False)).allclose(z, atol=0.1)
    dark = sample.latents(found, replace(chosen, coat="dark"))
    assert dark.equal(compose.pegasus(found.model, found.learned, found.bank, 4, 2, 3, steps=8))
    assert not dark.allclose(z, atol=1e-3)  # after an epoch horses hardly differ
    monkeypatch.setattr(compose, "prepare", None)  # a finished run has them already
    assert train.main(["--run", str(tmp_path), "--resume", "--epochs", "2"]) == 0
    assert train.main(["--run", str(tmp_path), "--resume", "--epochs", "3", "--no-judge"]) == 0
    assert sample.load(tmp_path / "last.pt").bank is None


def test_a_prior_of_no_epochs_and_its_start(batches, tmp_path):
    """Begun with one epoch a run has no prior; asked for more it learns one."""
    folder = tmp_path / "r"
    assert train.main(["--run", str(folder), "--data", str(batches), "--epochs", "1", *COMMAND]) == 0
    assert sample.load(folder / "last.pt").learned is None
    assert train.main(["--run", str(folder), "--data", str(batches), "--epochs", "2", "--resume", *COMMAND]) == 0
    assert sample.load(folder / "last.pt").learned is not None
    assert phases.Prior.name == checkpoint.load(folder / "last.pt")["phase"]


def test_a_batch_of_more_than_there_is(batches, tmp_path):
    argv = ("--run", tmp_path / "r", "--data", batches, "--epochs", 2, *COMMAND, "--batch-size", 10**12)
    assert train.main([str(word) for word in argv]) == 0

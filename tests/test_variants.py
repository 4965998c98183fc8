"""The Householder flow and the conditional prior, against matrices and brute force."""
import math

import reparam
import train
import vae
from pegasus import likelihoods
from pegasus.cli import UserError
from pegasus.data import datasets
from pegasus.drawing import sampler
from pegasus.drawing.sampler import SampleConfig
from pegasus.models import gaussians, variants
from pegasus.models.gaussians import Gaussian
from pegasus.models.variants import ConditionalVAE, HouseholderVAE
from pegasus.training import stages
from pegasus.training.config import TrainConfig, resolve
from pegasus.training.distributed import Workers
from pegasus.training.run import Run
from pegasus.training.signals import StopSignal

import pytest
import torch
from conftest import IMAGE_SHAPE, IMAGE_VALUES
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

CONFIG = {
    "arch": "mlp",
    "likelihood": "mse",
    "center": False,
    "latent": "4",
    "flow": 0,
    "components": 3,
}


# ---- which model a run's options ask for ----


@pytest.mark.parametrize(
    ("text", "shape"),
    [("128", (128,)), ("7", (7,)), ("8x8x8", (8, 8, 8)), ("8x8x3", (3, 8, 8))],
)
def test_latents_are_a_vector_or_a_grid(text, shape):
    assert variants.latent_shape(text) == shape


@pytest.mark.parametrize(
    "text",
    ["", "0", "x", "8x8", "8x8x0", "4x4x8", "-3", "8x8x8x8", "many", "99999999999",
     "8x8x99999999", "65537", "１"],
)
def test_latents_that_make_no_sense(text):
    with pytest.raises(UserError, match="--latent"):
        variants.latent_shape(text)


def test_a_grid_needs_the_convolutional_network():
    with pytest.raises(UserError, match="--arch conv"):
        variants.build(CONFIG | {"latent": "8x8x8", "prior": "normal"})


def test_options_name_the_model():
    plain = variants.build(CONFIG | {"prior": "normal"})
    assert type(plain) is vae.VAE
    assert plain.latent_shape == (4,)
    conditional = variants.build(CONFIG | {"prior": "conditional"})
    assert type(conditional) is ConditionalVAE
    assert len(conditional.conditional.mean) == 3
    flow = variants.build(CONFIG | {"prior": "normal", "flow": 2})
    assert type(flow) is HouseholderVAE
    assert len(flow.flow.layers) == 2
    grid = {"arch": "conv", "likelihood": "gaussian", "latent": "8x8x2", "prior": "learned"}
    learned = variants.build(CONFIG | grid)
    assert (type(learned), learned.latent_shape) == (vae.VAE, (2, 8, 8))


@pytest.mark.parametrize(
    "change",
    [
        {"prior": "normal"},
        {"prior": "normal", "flow": 2},
        {"prior": "conditional"},
        {"prior": "learned", "arch": "conv", "latent": "8x8x2"},
    ],
)
def test_a_centered_model_sees_pictures_less_a_half(change):
    """In all that is made of what it encodes: mean, variance, reflections, code, rate."""
    torch.manual_seed(0)
    centered = variants.build(CONFIG | change | {"center": True})
    plain = variants.build(CONFIG | change)
    for parameter in centered.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))  # codes differ
    plain.load_state_dict(centered.state_dict())
    x = torch.rand(4, *IMAGE_SHAPE)
    pairs = list(zip(centered.encode(x), plain.encode(x - 0.5), strict=True))
    seed = torch.tensor(2)
    pairs.append((centered(x, seed).rate, plain(x - 0.5, seed).rate))
    pairs.append((centered.reconstruct(x), plain.reconstruct(x - 0.5)))
    parts = zip(
        variants.components(centered, x), variants.components(plain, x - 0.5), strict=True
    )
    for one, other in parts:
        pairs += zip(one[:3], other[:3], strict=True)  # all but the decoders
        pairs.append((one.decode(one.mu), other.decode(other.mu)))
    for got, wanted in pairs:
        assert got.equal(wanted)
    assert not centered.encode(x)[0].allclose(plain.encode(x)[0], atol=1e-3)


@pytest.mark.parametrize("change", [{"flow": 2}, {"arch": "conv", "latent": "8x8x2"}])
def test_a_conditional_prior_needs_a_vector_and_no_flow(change):
    with pytest.raises(UserError, match="--prior: conditional needs a vector"):
        variants.build(CONFIG | {"prior": "conditional"} | change)


def test_a_plain_model_is_one_component():
    torch.manual_seed(0)
    model = vae.VAE(latent=(4,))
    x = torch.rand(3, *IMAGE_SHAPE)
    (part,) = variants.components(model, x)
    mu, logvar = model.encode(x)
    assert part.log_share.equal(torch.zeros(3))
    assert part.mu.equal(mu)
    assert part.logvar.equal(logvar)
    assert part.decode(mu).equal(model.decode(mu))


# ---- Householder flow ----


def random_units(n: int = 5, steps: int = 3, d: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return variants.unit(torch.randn(n, steps, d, generator=generator))


def matrices(units: Tensor) -> Tensor:
    """Return the product of I - 2 u u' of each row (n, T, d), the last one leftmost."""
    eye = torch.eye(units.shape[2], dtype=units.dtype)
    whole = eye.expand(len(units), -1, -1)
    for u in units.unbind(1):
        whole = (eye - 2 * u[:, :, None] * u[:, None, :]) @ whole
    return whole


def test_reflections_are_householders_matrices():
    z = torch.randn(5, 7)
    u = random_units()
    wanted = (matrices(u) @ z[:, :, None])[:, :, 0]
    torch.testing.assert_close(variants.reflect(z, u), wanted)


@pytest.mark.parametrize("length", [1.0, 1e-30, 1e30])
def test_the_norm_is_kept_and_each_reflection_is_its_own_inverse(length):
    z = torch.randn(64, 128)
    u = variants.unit(length * torch.randn(64, 4, 128))
    reflected = variants.reflect(z, u)
    torch.testing.assert_close(reflected.norm(dim=1), z.norm(dim=1))
    first = u[:, :1]
    twice = variants.reflect(variants.reflect(z, first), first)
    torch.testing.assert_close(twice, z)
    torch.testing.assert_close(variants.reflect(reflected, u.flip(1)), z)
    assert not reflected.allclose(z, atol=0.1)


def test_no_direction_reflects_nothing():
    z = torch.randn(2, 4)
    zero = variants.unit(torch.zeros(2, 1, 4))
    assert variants.reflect(z, zero).equal(z)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_mean_covariance(steps):
    u = random_units(steps=steps).double()
    variance = torch.rand(5, 7, dtype=torch.float64)
    h = matrices(u)
    wanted = (h @ variance.diag_embed() @ h.mT).mean(0)
    torch.testing.assert_close(variants.mean_covariance(variance, u), wanted)


@pytest.mark.parametrize(
    ("arch", "latent"), [("mlp", (12,)), ("conv", (12,)), ("conv", (2, 8, 8))]
)
def test_a_householder_model(arch, latent):
    """The rate is the divergence of the reflected Gaussian; every weight is trained."""
    torch.manual_seed(0)
    model = HouseholderVAE(arch, "gaussian", latent, False, reflections=3)
    d = model.latent_size
    x = torch.rand(2, *IMAGE_SHAPE)
    terms = model(x, torch.tensor(2))
    mu, logvar, u = model.encode_reflected(x)
    h = matrices(u)
    covariance = h @ logvar.exp().diag_embed() @ h.mT
    mean = (h @ mu[:, :, None])[:, :, 0]
    posterior = MultivariateNormal(mean, (covariance + covariance.mT) / 2)
    prior = MultivariateNormal(torch.zeros(d), torch.eye(d))
    rate = kl_divergence(posterior, prior)
    torch.testing.assert_close(terms.rate, rate, rtol=1e-3, atol=1e-3)
    eps = reparam.normals(2, d, 2)
    z = (h @ (mu + (logvar / 2).exp() * eps)[:, :, None])[:, :, 0]
    sse = (x - model.decode(z)).square().sum((1, 2, 3))
    torch.testing.assert_close(terms.sse, sse, rtol=1e-4, atol=1e-3)
    images = model.reconstruct(x)
    torch.testing.assert_close(images, model.decode(mean), rtol=1e-4, atol=1e-4)
    (part,) = variants.components(model, x)
    assert part.decode(mu).equal(images)
    assert not model.decode(mu).allclose(images, atol=1e-3)
    terms.sse.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.flow.parameters())


def test_gaussians_are_fitted_behind_the_flow():
    """Mean and covariance of many samples of the posteriors themselves."""
    torch.manual_seed(1)
    model = HouseholderVAE("mlp", "mse", (6,), False, reflections=2)
    torch.nn.init.normal_(model.encoder[-1].weight, std=0.1)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.zeros(20, dtype=torch.int64)
    fitted = gaussians.fit_classes(model, images, labels, ("horse",))
    gaussian = Gaussian(*fitted["horse"])
    with torch.no_grad():
        before, logvar, u = model.encode_reflected(images / 255)
    eps = torch.randn(20_000, 20, 6)
    z = (before + (logvar / 2).exp() * eps).flatten(0, 1)
    z = variants.reflect(z, u.repeat(20_000, 1, 1)).double()
    off = variants.reflect(before, u).double().T.cov(correction=0)
    shrunk = (off - off.diagonal().diag()) * (1 - 20 / 26)
    covariance = (gaussian.covariance + shrunk) / z.var(0).mean()
    scale = z.var(0).mean().sqrt()
    mean = gaussian.mean.double() / scale
    torch.testing.assert_close(mean, z.mean(0) / scale, rtol=0, atol=0.01)
    torch.testing.assert_close(covariance, z.T.cov() / scale**2, rtol=0, atol=0.02)


def test_a_run_with_a_flow(batches, tmp_path, complaint):
    argv = ["--run", str(tmp_path / "r"), "--arch", "mlp"]
    train.main([*argv, "--data", str(batches), "--epochs", "1", "--flow", "2"])
    train.main([*argv, "--resume", "--epochs", "2"])
    loaded = sampler.load(tmp_path / "r" / "last.pt")
    model = loaded.model
    assert len(model.flow.layers) == 2
    assert sampler.sample(loaded).shape == (64, *IMAGE_SHAPE)
    assert "--flow: got 1" in complaint(train.main, *argv, "--resume", "--flow", 1)
    x = torch.rand(4, *IMAGE_SHAPE)
    samples = likelihoods.posterior_samples(model, x, 200, seed=0)
    seeds = [reparam.derive_seed(0, i, likelihoods.NOISE) for i in range(200)]
    with torch.no_grad():
        terms = [model(x, torch.tensor(seed)) for seed in seeds]
    rate, sse = (torch.stack(part).double() for part in zip(*terms, strict=True))
    nll = vae.gaussian_nll(sse, model.variance.double(), IMAGE_VALUES)
    elbo = -(nll + rate).mean(0)
    torch.testing.assert_close(samples.log_weight.mean(0), elbo, rtol=0, atol=0.5)
    assert samples.elbo.equal(samples.log_weight)  # without a code


# ---- conditional prior ----


def conditional_model(components: int = 4, arch: str = "mlp") -> ConditionalVAE:
    """Return a model whose codes differ and are neither certain nor even."""
    torch.manual_seed(0)
    model = ConditionalVAE(arch, "gaussian", (6,), False, count=components)
    prior = model.conditional
    changed = [prior.mean, prior.shift, prior.logvar, prior.logits.weight]
    with torch.no_grad():
        for tensor in (*changed, model.decoder[0].weight):
            tensor.normal_(std=0.3)
    model.variance.fill_(0.05)
    return model


def by_hand(
    model: ConditionalVAE, x: Tensor
) -> tuple[Tensor, list[Distribution], list[Distribution]]:
    """Return log q(c|x) (B, K), and posterior and prior of each code."""
    h = model.encoder[:-1](x)
    prior = model.conditional
    mu, logvar = model.encoder[-1](h).chunk(2, 1)
    mu_shift, logvar_shift = prior.shift.chunk(2, 1)
    posteriors = []
    priors = []
    for k in range(len(prior.mean)):
        std = ((logvar + logvar_shift[k]) / 2).exp()
        posteriors.append(Normal(mu + mu_shift[k], std))
        priors.append(Normal(prior.mean[k], (prior.logvar[k] / 2).exp()))
    return prior.logits(h).log_softmax(1), posteriors, priors


def one_hot(model: ConditionalVAE, k: int, n: int) -> Tensor:
    return torch.eye(len(model.conditional.mean))[k].expand(n, -1)


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_the_sum_over_codes(arch):
    """Rates, errors and latents of every code against torch.distributions."""
    model = conditional_model(arch=arch)
    x = torch.rand(3, *IMAGE_SHAPE)
    log_share, posteriors, priors = by_hand(model, x)
    share = Categorical(logits=log_share)
    rate = kl_divergence(share, Categorical(torch.ones(3, 4)))
    eps = reparam.normals(3, 6, 5)
    sse = 0
    for k in range(4):
        divergence = kl_divergence(posteriors[k], priors[k]).sum(1)
        rate = rate + share.probs[:, k] * divergence
        z = posteriors[k].mean + posteriors[k].stddev * eps
        error = (x - model.decode(z, one_hot(model, k, 3))).square().flatten(1).sum(1)
        sse = sse + share.probs[:, k] * error
    terms = model(x, torch.tensor(5))
    torch.testing.assert_close(terms.rate, rate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.sse, sse, rtol=1e-4, atol=1e-4)
    assert not model(x, torch.tensor(5), 0, 0.3).sse.allclose(sse, rtol=1e-3)


@pytest.mark.parametrize("arch", ["mlp", "conv"])
def test_a_relaxed_code(arch):
    """Its rate is the same sum; the decoder gets the mixture of codes."""
    model = conditional_model(arch=arch)
    x = torch.rand(3, *IMAGE_SHAPE)
    seed = torch.tensor(5)
    log_share, _, _ = by_hand(model, x)
    terms = model(x, seed, 0, 0.3)
    rate = model(x, seed).rate
    torch.testing.assert_close(terms.rate, rate, rtol=1e-4, atol=1e-4)
    code = ((log_share + variants.gumbel(3, 4, seed)) / 0.85).softmax(1)
    joint = model.encoder(x) + code @ model.conditional.shift
    z = joint[:, :6] + (joint[:, 6:] / 2).exp() * reparam.normals(3, 6, 5)
    sse = (x - model.decode(z, code)).square().flatten(1).sum(1)
    torch.testing.assert_close(terms.sse, sse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("progress", [None, 0.5])
def test_one_code_is_a_plain_model_with_a_learned_diagonal_prior(progress):
    """The same loss and gradients from N(m, s^2) written out, relaxed or not."""
    model = conditional_model(components=1)
    x = torch.rand(5, *IMAGE_SHAPE)
    terms = model(x, torch.tensor(3), 0, progress)
    (terms.sse + terms.rate).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    _, (posterior,), (prior,) = by_hand(model, x)
    z = posterior.mean + posterior.stddev * reparam.normals(5, 6, 3)
    xhat = model.decoder(torch.cat([z, torch.ones(5, 1)], 1)).sigmoid()
    divergence = kl_divergence(posterior, prior).sum(1)
    loss = (x - xhat).square().flatten(1).sum(1) + divergence
    torch.testing.assert_close(terms.sse + terms.rate, loss)
    loss.mean().backward()
    for name, p in model.named_parameters():
        got = gradients[name]
        if "logits" in name:  # a code of one value has nothing to learn
            assert p.grad is None and got.abs().max() < 1e-5, name
        else:
            torch.testing.assert_close(got, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_training_step_reaches_all_of_the_prior(batches, tmp_path):
    settings = {"arch": "mlp", "prior": "conditional", "components": 3, "latent": "6"}
    places = {"data": str(batches), "run": str(tmp_path), "device": "cpu"}
    config = resolve(TrainConfig(batch_size=100, threads=1, **settings, **places))
    run = Run(config, datasets.load(config.data, config.classes))
    torch.nn.init.normal_(run.model.decoder[0].weight)  # codes do nothing at the start
    workers = Workers("cpu")
    stage = run.next_stage(workers)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    rows, mirrored = train.batches(run, stage)[0]
    x = stages.gather(stage.images, rows, mirrored)
    seed = stages.derived_seeds(config.seed, 0, stage.purposes, "cpu")
    with torch.no_grad(), stages.device.autocast("cpu", config.precision):
        relaxed = run.model(x, seed, 0, 0.0).sse.sum().double()
        exact = run.model(x, seed).sse.sum().double()
    stop = StopSignal()
    stop.asked = 15  # after one step
    (adam,) = train.make_optimizers(stage)
    train.train_stage(run, stage, [adam], workers, stop)
    assert (run.step, stop.agreed) == (1, 15)
    torch.testing.assert_close(run.guard.totals[2], relaxed)
    assert not relaxed.allclose(exact, rtol=1e-4)
    for name, p in run.model.named_parameters():
        assert p.grad.abs().sum() > 0, name
        assert not before[name].equal(p), name
    assert len(adam.state) == len(before)


@pytest.mark.parametrize("progress", [None, 0.5])
def test_a_rows_noise_is_its_own(progress):
    model = conditional_model()
    x = torch.rand(7, *IMAGE_SHAPE)
    seed = torch.tensor(9)
    whole = model(x, seed, 0, progress)
    parts = [model(x[:2], seed, 0, progress), model(x[2:], seed, 2, progress)]
    for pair, term in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(pair), term)


def test_gumbel_noise_is_a_function_of_seed_row_and_column():
    seed = torch.tensor(9)
    noise = variants.gumbel(6, 5, seed)
    assert variants.gumbel(2, 5, seed, 4).equal(noise[4:])
    assert variants.gumbel(6, 2, seed).equal(noise[:, :2])
    assert not variants.gumbel(6, 5, torch.tensor(10)).allclose(noise)


def test_gumbel_draws_codes_from_their_probabilities():
    """The largest of log q + Gumbel is a draw from q (Gumbel 1954).

    The noise is not the latents'.
    """
    seed = torch.tensor(1)
    n = 200_000
    noise = variants.gumbel(n, 4, seed)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = (share.log() + noise).argmax(1).bincount() / n
    torch.testing.assert_close(counts, share, rtol=0, atol=0.005)
    both = torch.cat([noise, reparam.normals(n, 4, 1)], 1)
    assert both.T.corrcoef()[:4, 4:].abs().max() < 0.01
    prior = variants.Conditional(4, 2, 3)
    codes = prior.relax(share.log().expand(n, -1), seed, 0, 0.01)
    torch.testing.assert_close(codes.mean(0), counts, rtol=0, atol=0.005)
    torch.testing.assert_close(codes.sum(1), torch.ones(n))


def likelihood(x: Tensor, xhat: Tensor, variance: Tensor) -> Tensor:
    """A likelihood that is small, so that it hides nothing."""
    return -(x - xhat).square().flatten(1).mean(1) / variance


def test_bounds_against_brute_force(monkeypatch):
    """Each sample's ELBO and weight from joint densities of x, z and c."""
    monkeypatch.setattr(likelihoods, "log_likelihood", likelihood)
    model = conditional_model()
    x = torch.rand(5, *IMAGE_SHAPE)
    with torch.no_grad():
        samples = likelihoods.posterior_samples(model, x, 6, 2)
        log_share, posteriors, priors = by_hand(model, x)
    for i in range(6):
        eps = reparam.normals(5, 6, reparam.derive_seed(2, i, likelihoods.NOISE))
        rows = []
        for k in range(4):
            z = posteriors[k].mean + posteriors[k].stddev * eps
            image = model.decode(z, one_hot(model, k, 5))
            log_x = likelihood(x, image, model.variance)
            log_z = (priors[k].log_prob(z) - posteriors[k].log_prob(z)).sum(1)
            rows.append(log_x + log_z - math.log(4))
        log_weight = torch.stack(rows).detach().double()  # (K, B)
        share = log_share.T.double()
        elbo = (share.exp() * (log_weight - share)).sum(0)
        weight = log_weight.logsumexp(0)
        for got, wanted in zip(samples, (elbo, weight), strict=True):
            torch.testing.assert_close(got[i], wanted, rtol=1e-4, atol=1e-4)


def test_the_bound_of_many_samples_is_the_larger(monkeypatch):
    """And the smaller one is the likelihood's expectation less the rate."""
    monkeypatch.setattr(likelihoods, "log_likelihood", likelihood)
    model = conditional_model()
    x = torch.rand(5, *IMAGE_SHAPE)
    samples = likelihoods.posterior_samples(model, x, 200, 2)
    assert (samples.log_weight >= samples.elbo).all()
    tighter = likelihoods.importance_weighted(samples.log_weight)
    assert (tighter >= samples.elbo.mean(0)).all()
    seeds = [reparam.derive_seed(2, i, likelihoods.NOISE) for i in range(200)]
    with torch.no_grad():
        terms = [model(x, torch.tensor(seed)) for seed in seeds]
    rate, sse = (torch.stack(part).double().mean(0) for part in zip(*terms, strict=True))
    wanted = -sse / (IMAGE_VALUES * model.variance) - rate
    torch.testing.assert_close(samples.elbo.mean(0), wanted, rtol=0, atol=0.3)


def test_codes_of_latents_and_samples_of_the_prior():
    model = conditional_model(components=3)
    prior = model.conditional
    with torch.no_grad():
        prior.mean.copy_(torch.eye(3, 6) * 20)
    assert prior.infer(prior.mean + 1).equal(torch.eye(3))
    n = 30_000
    code = model.sample_codes(n, 4)
    assert model.sample_codes(5, 4).equal(code[:5])
    z = model.sample_latents(reparam.normals(n, 6, 4), code).detach()
    assert prior.infer(z).equal(code)  # that far apart
    number = code.argmax(1)
    third = torch.ones(3) / 3
    torch.testing.assert_close(number.bincount() / n, third, rtol=0, atol=0.01)
    for k in range(3):
        of_code = z[number == k]
        mean = prior.mean[k].detach()
        torch.testing.assert_close(of_code.mean(0), mean, rtol=0, atol=0.06)
        logvar = prior.logvar[k].detach()
        torch.testing.assert_close(of_code.var(0).log(), logvar, rtol=0, atol=0.06)


def test_the_likeliest_code_of_latents_between_the_means():
    model = conditional_model(components=3)
    prior = model.conditional
    z = 6 + 5 * torch.randn(500, 6)
    log_z = []
    for mean, logvar in zip(prior.mean, prior.logvar, strict=True):
        log_z.append(Normal(mean, (logvar / 2).exp()).log_prob(z).sum(1))
    assert prior.infer(z).argmax(1).equal(torch.stack(log_z, 1).argmax(1))


def test_the_posterior_is_the_likeliest_codes():
    model = conditional_model()
    x = torch.rand(9, 3, 1, 1).expand(-1, *IMAGE_SHAPE)
    log_share, posteriors, _ = by_hand(model, x)
    best = log_share.argmax(1)
    assert len(best.unique()) > 1
    mu, logvar = model.encode(x)
    for i, k in enumerate(best):
        torch.testing.assert_close(mu[i], posteriors[k].mean[i])
        torch.testing.assert_close(logvar[i].exp(), posteriors[k].variance[i])


def test_components_decode_from_standard_coordinates():
    model = conditional_model()
    x = torch.rand(3, *IMAGE_SHAPE)
    log_share, posteriors, priors = by_hand(model, x)
    parts = variants.components(model, x)
    for k, (part, posterior, prior) in enumerate(zip(parts, posteriors, priors, strict=True)):
        torch.testing.assert_close(part.log_share, log_share[:, k])
        torch.testing.assert_close(prior.mean + prior.stddev * part.mu, posterior.mean)
        wanted = model.decode(posterior.mean, one_hot(model, k, 3))
        torch.testing.assert_close(part.decode(part.mu), wanted)


def test_a_conditional_run(batches, tmp_path, complaint, stop_at):
    """Stopped and resumed it is the unbroken one to the bit; its checkpoint draws."""
    def run(name: str, *argv: str) -> int:
        place = ("--data", str(batches), "--run", str(tmp_path / name))
        model = ("--arch", "mlp", "--prior", "conditional", "--components", "3")
        return train.main([*place, *model, "--epochs", "2", *argv])

    assert run("a") == 0
    stop_at(1)
    assert run("b") == 143
    stop_at(None)
    assert run("b", "--resume") == 0
    one, two = (sampler.load(tmp_path / name / "last.pt") for name in "ab")
    assert one.about["model"] == two.about["model"]
    logs = [(tmp_path / name / "log.csv").read_bytes() for name in "ab"]
    assert logs[0] == logs[1]
    for mode in sampler.modes(one):
        assert sampler.sample(one, SampleConfig(mode=mode, n=6)).isfinite().all()
    config = SampleConfig(mode="prior", n=50)
    z = sampler.latents(one, config)
    code = one.model.sample_codes(50, 0)
    assert sampler.sample(one, config).equal(one.model.decode(z, code).detach())
    assert not one.model.conditional.infer(z).equal(code)  # which samples know all the same
    argv = ("--run", tmp_path / "a", "--resume", "--prior", "normal")
    assert "--prior: got normal" in complaint(train.main, *argv)
    for wrong in (("--flow", 2), ("--arch", "conv", "--latent", "8x8x2")):
        argv = ("--data", batches, "--run", tmp_path / "c", "--prior", "conditional", *wrong)
        assert "--prior: conditional needs a vector" in complaint(train.main, *argv)

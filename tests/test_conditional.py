import math

import conditional
import evaluate
import phases
import reparam
import sample
import train
import vae

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence


def model(components=4, arch="mlp", latent="6", seed=0):
    """A model whose codes differ and are neither certain nor even."""
    torch.manual_seed(seed)
    found = vae.VAE(arch, "gaussian", latent, components=components)
    with torch.no_grad():
        codes = found.conditional
        for tensor in (codes.mean, codes.shift, codes.logvar, codes.logits.weight, found.decoder[0].weight):
            tensor.normal_(std=0.3)
    found.variance.fill_(0.05)
    return found


def by_hand(found, x):
    """log q(c|x) (B, K), and posterior and prior of each code as torch.distributions."""
    h, codes = found.encoder[:-1](x), found.conditional
    mu, logvar = found.encoder[-1](h).chunk(2, 1)
    shift = codes.shift.chunk(2, 1)
    posteriors = [Normal(mu + shift[0][k], ((logvar + shift[1][k]) / 2).exp()) for k in range(len(codes.mean))]
    priors = [Normal(codes.mean[k], (codes.logvar[k] / 2).exp()) for k in range(len(codes.mean))]
    return codes.logits(h).log_softmax(1), posteriors, priors


def one_hot(found, k, n):
    return torch.eye(len(found.conditional.mean))[k].expand(n, -1)


@pytest.mark.parametrize(("arch", "latent"), [("mlp", "6"), ("conv", "6")])
def test_the_sum_over_codes(arch, latent):
    """Rates, errors and latents of every code against torch.distributions; a relaxed code's rate is the same sum."""
    found, x, seed = model(arch=arch, latent=latent), torch.rand(3, 3, 32, 32), torch.tensor(5)
    log_share, posteriors, priors = by_hand(found, x)
    share = Categorical(logits=log_share)
    rate = kl_divergence(share, Categorical(torch.ones(3, 4)))
    eps, sse = vae.noise(3, 6, 5), 0
    for k in range(4):
        rate = rate + share.probs[:, k] * kl_divergence(posteriors[k], priors[k]).sum(1)
        z = posteriors[k].mean + posteriors[k].stddev * eps
        error = (x - found.decode(z, one_hot(found, k, 3))).square().flatten(1).sum(1)
        sse = sse + share.probs[:, k] * error
    terms = found(x, seed)
    torch.testing.assert_close(terms.rate, rate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.sse, sse, rtol=1e-4, atol=1e-4)
    relaxed = found(x, seed, 0, 0.3)
    torch.testing.assert_close(relaxed.rate, rate, rtol=1e-4, atol=1e-4)
    code = ((log_share + conditional.gumbel(3, 4, seed)) / 0.85).softmax(1)
    joint = found.encoder(x) + code @ found.conditional.shift
    z = joint[:, :6] + (joint[:, 6:] / 2).exp() * eps
    wanted = (x - found.decode(z, code)).square().flatten(1).sum(1)
    torch.testing.assert_close(relaxed.sse, wanted, rtol=1e-4, atol=1e-4)
    assert not relaxed.sse.allclose(sse, rtol=1e-3)


def test_one_code_is_a_plain_model_with_a_learned_diagonal_prior():
    """The same loss and gradients from N(m, s^2) written out, relaxed or not."""
    for progress in (None, 0.5):
        found, x = model(components=1), torch.rand(5, 3, 32, 32)
        terms = found(x, torch.tensor(3), 0, progress)
        (terms.sse + terms.rate).mean().backward()
        gradients = {name: p.grad.clone() for name, p in found.named_parameters()}
        found.zero_grad()
        _, (posterior,), (prior,) = by_hand(found, x)
        z = posterior.mean + posterior.stddev * vae.noise(5, 6, 3)
        xhat = found.decoder(torch.cat([z, torch.ones(5, 1)], 1)).sigmoid()
        loss = (x - xhat).square().flatten(1).sum(1) + kl_divergence(posterior, prior).sum(1)
        torch.testing.assert_close(terms.sse + terms.rate, loss)
        loss.mean().backward()
        for name, p in found.named_parameters():
            if "logits" in name:  # a code of one value has nothing to learn
                assert p.grad is None and gradients[name].abs().max() < 1e-5, name
            else:
                torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_prior_is_trained(batches, tmp_path):
    chosen = train.recipe.resolve(train.Options(arch="mlp", prior="conditional", components=3, device="cpu",
                                                data=str(batches), run=str(tmp_path), latent="6"))
    training = train.begin(chosen, set(), train.Group("cpu"))
    torch.nn.init.normal_(training.model.decoder[0].weight)  # codes do nothing at the start
    training.enter()
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    x = phases.gather(training.phase.images, torch.arange(100), None)
    with phases.autocast(training.options), torch.no_grad():
        seed = phases.purpose_seeds(training.options, 0, *training.phase.purposes)
        relaxed, exact = (training.model(x, seed, 0, progress).sse.sum().double()
                          for progress in (0, None))
    training.train_step(torch.arange(100), None)
    torch.testing.assert_close(training.totals[2], relaxed)
    assert not relaxed.allclose(exact, rtol=1e-4)
    for name, p in training.optimizer.trained.named_parameters():
        assert p.grad.abs().sum() > 0, name
    for name in ("conditional.mean", "conditional.logvar", "conditional.shift", "conditional.logits.weight"):
        assert not before[name].equal(dict(training.model.named_parameters())[name]), name
    assert len(training.optimizer.pairs) == len(before)


def test_a_rows_noise_is_its_own():
    found, x, seed = model(), torch.rand(7, 3, 32, 32), torch.tensor(9)
    for progress in (None, 0.5):
        whole = found(x, seed, 0, progress)
        parts = [found(x[rows], seed, rows.start, progress) for rows in (slice(0, 2), slice(2, 7))]
        for part, term in zip(zip(*parts, strict=True), whole, strict=True):
            torch.testing.assert_close(torch.cat(part), term)
    noise = conditional.gumbel(6, 5, seed)
    assert conditional.gumbel(2, 5, seed, 4).equal(noise[4:])
    assert conditional.gumbel(6, 2, seed).equal(noise[:, :2])
    assert not conditional.gumbel(6, 5, torch.tensor(10)).allclose(noise)


def test_gumbel_draws_codes_from_their_probabilities():
    """The largest of log q + Gumbel is a draw from q (Gumbel 1954), and the noise is not the latents'."""
    noise = conditional.gumbel(200_000, 4, torch.tensor(1))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = (share.log() + noise).argmax(1).bincount() / len(noise)
    torch.testing.assert_close(counts, share, rtol=0, atol=0.005)
    eps = vae.noise(200_000, 4, 1)
    assert torch.cat([noise, eps], 1).T.corrcoef()[:4, 4:].abs().max() < 0.01
    codes = conditional.Conditional(4, 2, 3).relax(share.log().expand(200_000, -1), torch.tensor(1), 0, 0.01)
    torch.testing.assert_close(codes.mean(0), counts, rtol=0, atol=0.005)
    torch.testing.assert_close(codes.sum(1), torch.ones(200_000))


def test_bounds_against_brute_force():
    """Each sample's ELBO and weight from joint densities of x, z and c; the bound of many samples is the larger."""
    def likelihood(x, xhat, variance):  # small, so that it hides nothing
        return -(x - xhat).square().flatten(1).mean(1) / variance

    found, x = model(), (torch.rand(5, 3, 32, 32) * 255).round() / 255
    with torch.no_grad():
        known, elbo, weights = evaluate.samples(found, x, 6, 2, likelihood)
        log_share, posteriors, priors = by_hand(found, x)
        for i in range(6):
            eps = vae.noise(5, 6, reparam.derive_seed(2, i, evaluate.BOUND))
            wanted, joint, like = 0, [], 0
            for k in range(4):
                z = posteriors[k].mean + posteriors[k].stddev * eps
                log_x = likelihood(x, found.decode(z, one_hot(found, k, 5)), found.variance)
                log_w = log_x + priors[k].log_prob(z).sum(1) - math.log(4) - posteriors[k].log_prob(z).sum(1)
                wanted = wanted + log_share[:, k].exp() * (log_w - log_share[:, k])
                like = like + log_share[:, k].exp() * log_x
                joint.append(log_w)
            torch.testing.assert_close(elbo[i], wanted.double(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(known[i], like.double(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(weights[i], torch.stack(joint).logsumexp(0).double(), rtol=1e-4, atol=1e-4)
    assert (weights >= elbo).all()
    assert (evaluate.importance_weighted(weights) >= elbo.mean(0)).all()
    bounds = evaluate.bounds(found, (x * 255).byte(), 6, seed=2)
    assert bounds["bits_per_dim_iw"] < bounds["bits_per_dim_elbo"]
    both = (bounds["rate"] + bounds["distortion"]) / (vae.PIXELS * math.log(2))
    assert bounds["bits_per_dim_elbo"] == pytest.approx(both, abs=2e-3)


def test_codes_of_latents_and_draws_of_the_prior():
    found = model(components=3)
    with torch.no_grad():
        found.conditional.mean.copy_(torch.eye(3, 6) * 20)
    codes = found.conditional.infer(found.conditional.mean + 1)
    assert codes.equal(torch.eye(3))
    code, few = (found.conditional.codes(n, 4) for n in (30_000, 5))
    assert few.equal(code[:5])
    z = found.conditional.draw(vae.noise(30_000, 6, 4), code).detach()
    drawn = code.argmax(1)
    assert found.conditional.infer(z).equal(code)  # that far apart
    torch.testing.assert_close(drawn.bincount() / 30_000, torch.ones(3) / 3, rtol=0, atol=0.01)
    for k in range(3):
        torch.testing.assert_close(z[drawn == k].mean(0), found.conditional.mean[k].detach(), rtol=0, atol=0.06)
        torch.testing.assert_close(z[drawn == k].var(0).log(), found.conditional.logvar[k].detach(), rtol=0, atol=0.06)
    between = 6 + 5 * torch.randn(500, 6)
    scales = (found.conditional.logvar / 2).exp()
    log_z = torch.stack([Normal(m, s).log_prob(between).sum(1) for m, s in zip(found.conditional.mean, scales,
                                                                              strict=True)], 1)
    assert found.conditional.infer(between).argmax(1).equal(log_z.argmax(1))


def test_the_posterior_is_the_likeliest_codes():
    found, images = model(), torch.randint(0, 256, (9, 3, 1, 1), dtype=torch.uint8).repeat(1, 1, 32, 32)
    log_share, posteriors, _ = by_hand(found, images / 255)
    best = log_share.argmax(1)
    assert len(best.unique()) > 1
    with torch.no_grad():
        mu, logvar, units = found.posterior(images / 255)
    for i, k in enumerate(best):
        torch.testing.assert_close(mu[i], posteriors[k].mean[i].detach())
        torch.testing.assert_close(logvar[i].exp(), posteriors[k].variance[i].detach())
    assert units.shape == (9, 0, 6)


def test_a_run(batches, tmp_path, complaint):
    """Stopped and resumed it is the unbroken one to the bit; its checkpoint draws; what doesn't fit is refused."""
    def run(name, *argv):
        return train.main([str(a) for a in ("--data", batches, "--run", tmp_path / name, "--arch", "mlp", "--no-judge",
                                            "--prior", "conditional", "--components", 3, "--epochs", 2, *argv)])

    run("a")
    chosen = train.Options(data=str(batches), run=str(tmp_path / "b"), arch="mlp", prior="conditional", components=3,
                           epochs=2, judge=False)
    training = train.begin(train.recipe.resolve(chosen), set(), train.Group("cpu"))
    (tmp_path / "b").mkdir()
    training.train_step(phases.epoch_order(0, 0, len(training.data.images))[:128], None)
    training.save()
    run("b", "--resume")
    one, two = (sample.load(tmp_path / name / "last.pt") for name in "ab")
    assert one.about["model"] == two.about["model"]
    assert (tmp_path / "a" / "log.csv").read_bytes() == (tmp_path / "b" / "log.csv").read_bytes()
    for mode in sample.modes(one):
        assert sample.draw(one, sample.Options(mode=mode, n=6)).isfinite().all()
    chosen = sample.Options(mode="prior", n=50)
    z, code = sample.latents(one, chosen), one.model.conditional.codes(50, 0)
    assert sample.draw(one, chosen).equal(one.model.decode(z, code).detach())
    assert not one.model.conditional.infer(z).equal(code)  # which the draws know all the same
    assert "--prior: got normal" in complaint(train.main, "--run", tmp_path / "a", "--resume", "--prior", "normal")
    for argv in (("--flow", 2), ("--arch", "conv", "--latent", "8x8x2")):
        sentence = complaint(train.main, "--data", batches, "--run", tmp_path / "c", "--prior", "conditional", *argv)
        assert "--prior: conditional needs a vector" in sentence


def test_components_count_under_the_conditional_prior_alone():
    config = {"arch": "mlp", "likelihood": "mse", "latent": "4", "flow": 0, "components": 3}
    assert vae.build(config | {"prior": "normal"}).conditional is None
    assert len(vae.build(config | {"prior": "conditional"}).conditional.mean) == 3

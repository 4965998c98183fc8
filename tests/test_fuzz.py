"""hypothesis's inputs for the functions that `make fuzz` runs atheris on."""
import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = fuzz.seeds()


def changed(name: str) -> st.SearchStrategy[bytes]:
    """Any bytes, or a good input with some of them in place of a part of it."""
    def put(seed: bytes, at: int, length: int, new: bytes) -> bytes:
        return seed[:at % len(seed)] + new + seed[at % len(seed) + length:]
    places = st.integers(0, 9999), st.integers(0, 20)
    return st.binary(max_size=300) | st.builds(put, st.sampled_from(SEEDS[name]), *places, st.binary(max_size=9))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_bytes_are_read_or_refused_in_a_sentence(name):
    @settings(deadline=None, max_examples=150, derandomize=True, database=None)
    @given(changed(name))
    def run(data: bytes) -> None:
        fuzz.TARGETS[name](data)
    run()


@pytest.mark.parametrize(("name", "module", "reader"), [
    ("batch", fuzz.cifar10, "read"), ("checkpoint", fuzz.checkpoint, "load"), ("pickle", fuzz.checkpoint, "load"),
    ("command", fuzz.options, "parse")])
def test_good_inputs_are_read(monkeypatch, name, module, reader):
    """Else the above would look at nothing but refusals."""
    read, done = getattr(module, reader), []
    monkeypatch.setattr(module, reader, lambda *args: done.append(read(*args)) or done[-1])
    for seed in SEEDS[name]:
        fuzz.TARGETS[name](seed)
    assert done

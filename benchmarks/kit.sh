# What a GPU script needs of the kit KIT, for `.` after $kit and $here are set: packages and paths.
#
# The machine has Python and PyTorch. WORK is a folder to keep data and models in; without it they
# go into a temporary one, $work.
python=${PYTHON:-python3}
if [ -n "${WORK:-}" ]; then
    mkdir -p "$WORK"
    work=$WORK
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
[ -d "$work/site" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile \
    --target "$work/site" "$kit"/wheels/*.whl
export PYTHONPYCACHEPREFIX="$work/compiled"  # else every step compiles thousands of modules
export COUNTERMARK_CACHE="$work/cache"
export PYTHONPATH="$here/src:$work/site"

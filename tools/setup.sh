#!/usr/bin/env bash
# Makes .venv, with all that `make quickstart` and `make test` need, on a bare Debian or Ubuntu with Python 3.11 or 3.12.
#
#     bash tools/setup.sh                      a second call finds that all is there, and returns at once
#     PYTHON=python3.12 bash tools/setup.sh    with this Python; a .venv of another version is made anew
#
# torch and the test tools are required. FFCV (compiled here) and DALI are not: where they cannot be had, one line says
# what to do, and the rest goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The stamp is written last, so an interrupted set-up is taken up again. It knows the place (a venv cannot be moved) and
# whatever decides what is installed.
stamp=.venv/.ready-$({ pwd && cat pyproject.toml tools/setup.sh; } | sha256sum | cut -c1-12)
asked=${PYTHON:-}
if [[ -e $stamp && -x .venv/bin/python && (-z $asked || $asked == "$(<"$stamp")") ]]; then
    exit 0
fi

say() { printf '%s\n' "setup: $*"; }
die() { printf '%s\n' "setup: error: $*" >&2 && exit 1; }

# step WHAT LOG COMMAND...: one line before, one after, the noise to a file; returns whether the command succeeded.
step() {
    local what=$1 log=$2 start=$SECONDS
    shift 2
    say "$what ..."
    if "$@" >"$log" 2>&1 </dev/null; then
        say "    done in $((SECONDS - start)) s"
    else
        say "    FAILED after $((SECONDS - start)) s; the end of $log:"
        tail -n 12 "$log" | cut -c1-200 | sed 's/^/        /'
        return 1
    fi
}

# The version, such as 3.12, if $1 is a Python that will do. It is run, because a name on PATH may be an empty shim.
usable() {
    "$1" -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v); sys.exit(v not in ((3, 11), (3, 12)))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${asked:-python3.12 python3.11 python3}; do
        if usable "$candidate" >/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

python=$(find_python) || die "need Python 3.11 or 3.12, found neither in ${asked:-python3.12 python3.11 python3}; on Debian" \
    "12 or Ubuntu 24.04: apt-get install python3, then go on with: PYTHON=/path/to/python3.12 make setup"
version=$(usable "$python")
mkdir -p .venv
rm -f .venv/.ready-*

# --- packages of the system --------------------------------------------------------------------------------------------

missing=()
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=("python$version-venv")
command -v g++ >/dev/null || missing+=(g++)
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[[ -e $include/Python.h ]] || missing+=("python$version-dev")
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
[[ -d /usr/share/datasets/fashion-mnist ]] || missing+=(dataset-fashion-mnist)

apt_install() {
    local package known=()
    export DEBIAN_FRONTEND=noninteractive
    step "apt-get update" .venv/apt-update.log apt-get update -q || return 1
    for package in "${missing[@]}"; do
        if apt-get install --simulate -q "$package" >/dev/null 2>&1; then
            known+=("$package")
        else
            say "this distribution has no package $package: left out"
        fi
    done
    [[ ${#known[@]} -eq 0 ]] ||
        step "apt-get install ${known[*]}" .venv/apt-install.log apt-get install -qy --no-install-recommends "${known[@]}"
}

if [[ ${#missing[@]} -gt 0 ]]; then
    by_hand="apt-get install --no-install-recommends ${missing[*]}"
    if ! command -v apt-get >/dev/null; then
        say "no apt-get here, left out: ${missing[*]}"
    elif [[ $EUID -ne 0 ]]; then
        say "not root, left out: ${missing[*]}; to have them: sudo $by_hand"
    else
        apt_install || say "went on without some of: ${missing[*]}; to try again: $by_hand"
    fi
fi

# --- the venv ----------------------------------------------------------------------------------------------------------

"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python has no venv module; type: sudo apt-get install python$version-venv, then go on with: make setup"
py=.venv/bin/python
found=$(usable "$py" || true)
if [[ -z $found || (-n $asked && $found != "$version") ]] || ! "$py" -m pip --version >/dev/null 2>&1; then
    rm -rf .venv/{bin,include,lib,lib64,share,pyvenv.cfg} # all but the logs
    step "venv of Python $version in .venv ($python)" .venv/venv.log "$python" -m venv .venv ||
        die "could not make .venv; when the cause is gone, go on with: make setup"
fi

pip_install() {
    "$py" -m pip install --quiet --disable-pip-version-check --no-input "$@"
}

step "torch, torchvision and tools (3 GB to fetch the first time)" .venv/pip-install.log pip_install -e ".[dev]" ||
    die "the trainer cannot run without these; when the cause is gone, go on with: make setup"

# --- FFCV and DALI: wanted, not needed ---------------------------------------------------------------------------------

# optional NAME MODULE PIP-ARGUMENTS...: built and imported, for only the import finds a missing shared library.
optional() {
    local name=$1 module=$2 log=.venv/$1-install.log
    shift 2
    install_and_import() { pip_install "$@" && "$py" -c "import $module"; }
    step "$name" "$log" install_and_import "$@" ||
        say "went on without $name; to have it, cure what $log says, then type: $py -m pip install ${*@Q}"
}

dali=(-e ".[dali]")
if [[ $("$py" -c 'import torch; print(torch.version.cuda)') == 12.* ]]; then
    dali=(nvidia-dali-cuda120) # pyproject.toml names the wheel for the CUDA 13 that today's torch brings
fi
optional ffcv ffcv -e ".[ffcv]"
if [[ $(uname -m) == x86_64 ]]; then
    optional dali nvidia.dali "${dali[@]}"
else
    say "DALI has no wheel for $(uname -m) here: left out"
fi

printf '%s' "$asked" >"$stamp"
say "ready in $SECONDS s; what is there and what is not: $py launch.py doctor"

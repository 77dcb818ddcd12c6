#!/bin/sh
# What this machine must have before anything is installed; one line for each thing that is missing.
# Called by the Makefile:  sh launcher/preflight.sh PYTHON
python=$1
missing=0
lacks() { echo "$1" >&2; missing=1; }

[ "$(uname -s)" = Linux ] || lacks "this toolkit runs on Linux; found $(uname -s)"

if ! command -v "$python" >/dev/null 2>&1; then
    lacks "$python is missing: install Python 3.11 or newer (apt-get install python3), or name one with PYTHON=..."
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    lacks "Python 3.11 or newer is needed; $python is older: install one and name it, e.g. make PYTHON=python3.11"
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        lacks "Python's venv module is missing: apt-get install python3-venv"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] ||
        lacks "Python's headers are missing ($headers/Python.h): apt-get install python3-dev"
fi

command -v "${CXX:-c++}" >/dev/null 2>&1 ||
    lacks "a C++ compiler is missing (${CXX:-c++}; DeepSpeed builds an operator with it): apt-get install g++"

free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
[ "$free_kib" -ge 5242880 ] ||
    lacks "5 GB of free disk are needed here; $((free_kib / 1048576)) GB are free: free some or move this folder"

exit "$missing"

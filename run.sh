#!/bin/sh
# Runs a command in the project's environment: sh run.sh python train.py
# The environment is .venv, made or brought up to date first where requirements.lock says so.
set -e
root=$(dirname "$(readlink -f "$0")")
if ! cmp -s "$root/requirements.lock" "$root/.venv/requirements.lock"; then
    exec 9> "$root/.venv.lock" # of several starts at once, one makes it and the others wait
    ! command -v flock > /dev/null || flock 9
    python3 -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install -q -r "$root/requirements.lock"
    cp "$root/requirements.lock" "$root/.venv/requirements.lock"
    exec 9>&-
fi
PATH="$root/.venv/bin:$PATH" exec "$@"

#!/usr/bin/env bash
# The checks that run no code: formatting and lint rules (ruff), types (mypy), who imports whom (import-linter).
#
#   bash launch/lint.sh                      all of them
#   bash launch/lint.sh style types layers   the ones named
#
# The interpreter is $PYTHON, or `python`; it needs the extra [test]. Exit code 1 if any check fails, after running all of them.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python}"
cd "$root"

# kernels/ is megatrain.kernels once installed; these tools read files, so they are shown a tree of links where it stands there.
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/megatrain"
ln -s "$root"/megatrain/* "$tree/megatrain/"
ln -s "$root/kernels" "$tree/megatrain/kernels"
ln -s "$root"/launch/*.py "$tree/"

style() { "$python" -m ruff check . && "$python" -m ruff format --check .; }
types() { (cd "$tree" && "$python" -m mypy --config-file "$root/setup.cfg" --cache-dir "$root/.mypy_cache" -p megatrain -m quickstart); }
layers() {
    (cd "$tree" && "$python" -c 'from importlinter.cli import lint_imports_command as run; run()' --config "$root/setup.cfg" --no-cache --no-logo)
}

if [ $# -eq 0 ]; then set -- style types layers; fi
failed=""
for check in "$@"; do
    case "$check" in
        style | types | layers) "$check" || failed="$failed $check" ;;
        *)
            echo "lint.sh: unknown check '$check'. Use style, types or layers." >&2
            exit 2
            ;;
    esac
done
if [ -n "$failed" ]; then
    echo "lint.sh: failed:$failed" >&2
    exit 1
fi

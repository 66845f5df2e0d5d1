#!/usr/bin/env bash
# From nothing to a trained language model, without a GPU, root, or any download but Python packages; about 9 minutes on 2 cores.
#
#   bash launch/quickstart.sh                     train on the Python standard library's own source and documentation
#   bash launch/quickstart.sh --minutes 40        train longer
#   bash launch/quickstart.sh --text notes/ a.txt train on your text
#   bash launch/quickstart.sh --model glm         train a GLM, which fills blanks
#   bash launch/quickstart.sh --help              everything else
#
# Run it again and it skips what is there; interrupt it and it goes on. The steps are in quickstart.py. Runs on bash 3.2 (macOS).
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/launch/install.sh"
exec "${MEGATRAIN_VENV:-$root/.venv}/bin/python" "$root/launch/quickstart.py" "$@"

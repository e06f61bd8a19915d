#!/usr/bin/env bash
# Installs what the docs site needs and serves it:  bash launch/docs.sh
# Or builds it in site/, and fails for a warning:  bash launch/docs.sh build --strict
# It needs neither JAX nor PyTorch, and what it builds needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_setup.sh

set_up docs
export NO_MKDOCS_2_WARNING=1 # the theme's notice, at each build, that it will not follow MkDocs to 2
exec .venv/bin/mkdocs "${@:-serve}"

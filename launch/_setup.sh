# Sourced by the scripts of launch/, in the project's root. `set_up EXTRA...` installs these extras
# of pyproject.toml into .venv, in the versions of constraints.txt, unless they are installed already.
# OSD_CONSTRAINTS names another constraints file; /dev/null selects the newest versions.

constraints=${OSD_CONSTRAINTS:-constraints.txt}

find_python() { # prints the path of a Python 3.11 or newer
    local name
    for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3 python3.14 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python" >&2
    return 1
}

set_up() {
    local extras stamp wanted python
    extras=$(IFS=,; echo "$*")
    stamp=".venv/installed-$extras"
    wanted=$(cat pyproject.toml "$constraints" launch/_setup.sh | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || return 1
        echo "Creating .venv with $("$python" --version)"
        if ! "$python" -m venv --clear .venv; then
            echo "error: $python cannot create a virtual environment; on Debian and Ubuntu install" \
                "the package python3-venv" >&2
            return 1
        fi
    fi
    echo "Installing $extras into .venv; the first time this takes a few minutes"
    case ",$extras," in
    *,torch,*) # first and separately, so that packages that need torch use this build
        .venv/bin/python -m pip install --quiet -c "$constraints" torch || return 1 ;;
    esac
    .venv/bin/python -m pip install --quiet -c "$constraints" -e ".[$extras]" || return 1
    echo "$wanted" >"$stamp"
}

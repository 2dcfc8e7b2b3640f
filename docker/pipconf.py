"""Gather this machine's pip configuration into the two secrets of an image's build.

    python3 docker/pipconf.py FOLDER

pip reads several files and the environment; a build reads `FOLDER/pipconf` alone. The CA bundle
that the configuration names, if any, is copied to `FOLDER/ca`. Folders and files of this machine
that it names are printed, one a line: the builder stage needs them mounted at the same place.
"""

import ast
import configparser
import shutil
import subprocess
import sys
from pathlib import Path

SECRETS = "/run/secrets"


def merge(listing: str) -> tuple[configparser.RawConfigParser, list[Path], str]:
    """Return the configuration, the local paths that it names, and its CA bundle or nothing.

    Args:
        listing: what `pip config list` prints, `section.name='value'` a line. The environment is
            the section `:env:`, and wins over the files.
    """
    parser = configparser.RawConfigParser()
    paths: list[Path] = []
    bundle = ""
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, quoted = line.partition("=")
        section, _, name = key.rpartition(".")
        section = "global" if section == ":env:" else section
        words = ast.literal_eval(quoted).split()
        if name == "config-file":
            continue
        if name == "cert":
            bundle, words = words[0], [f"{SECRETS}/ca"]
        else:
            paths += [path for word in words if (path := local(word)) and path not in paths]
        if not parser.has_section(section):
            parser.add_section(section)
        parser.set(section, name, "\n".join(words))
    return parser, paths, bundle


def local(word: str) -> Path | None:
    """Return the folder or file of this machine that a word of the configuration means, if any."""
    path = Path(word.removeprefix("file://"))
    if not path.is_absolute() or not path.exists():
        return None
    # The pages of an index link to files beside it.
    return path.parent if word.startswith("file://") and path.is_dir() else path


def main() -> None:
    """Write the secrets, print the paths."""
    folder = Path(sys.argv[1])
    listed = [sys.executable, "-m", "pip", "config", "list"]
    found = subprocess.run(listed, capture_output=True, text=True, check=True)
    parser, paths, bundle = merge(found.stdout)
    for name in ("pipconf", "ca"):
        (folder / name).touch(mode=0o600)
    with (folder / "pipconf").open("w") as file:
        parser.write(file)
    if bundle:
        shutil.copyfile(bundle, folder / "ca")
    sys.stdout.writelines(f"{path}\n" for path in paths)


if __name__ == "__main__":
    main()

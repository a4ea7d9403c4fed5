"""A wheel by itself, in an empty folder: what those have who cloned nothing."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxpeft import cli, runs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_train_and_configs(unpacked, tmp_path):
    assert runs.shipped_folder() == ROOT
    names = {config.name for config in runs.shipped_configs()}
    assert names == {
        path.stem for path in (unpacked / "jaxpeft/shipped/configs").iterdir()
    }
    environment = os.environ | {"PYTHONPATH": str(unpacked), "JAX_PLATFORMS": "cpu"}
    code = (
        "import jaxpeft, sys\n"
        f"assert jaxpeft.__file__.startswith({str(unpacked)!r})\n"
        "from jaxpeft.cli import main\n"
        "assert main(['configs']) == 0\n"
        # train.py, a config, and the model's outline, all by name; nothing is trained.
        "overrides = ['--config.adapter=ia3()', '--config.batch_size=8']\n"
        "sys.exit(main(['train', '--config', 'quickstart', '--dry-run', *overrides]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "KaSA on MiniLM" in done.stdout and "Measured: test accuracy" in done.stdout
    assert str(unpacked / "jaxpeft/shipped/configs") in done.stdout
    assert not any(tmp_path.iterdir())


def test_configs_by_name(capsys):
    assert runs.config_file("quickstart") == ROOT / "configs/quickstart.py"
    assert runs.config_file("other/quickstart") == Path("other/quickstart")
    assert cli.main(["configs", "quickstart"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/quickstart.py").read_text()
    assert cli.main(["configs", "quickstrat"]) == 2
    assert "nearest: ['quickstart'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"nearest: \['quickstart"):
        runs.load_config("quickstat")


def test_train_is_given_its_arguments(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", "quickstart", "--config.adapter=kasa(3)"])
    assert "argument without a name" in capsys.readouterr().err

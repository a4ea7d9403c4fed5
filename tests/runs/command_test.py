from pathlib import Path

import pytest

from jaxpeft import runs

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.py"
parse = lambda *argv: runs.parse_command(list(argv), QUICKSTART)


def test_without_arguments_it_is_the_quickstart():
    command = parse()
    assert command.config.adapter.name == "kasa" and command.config.data.name == "trec"
    assert command.workdir == Path("runs/quickstart") and not command.distributed


def test_arguments():
    config = f"--config={QUICKSTART.with_name('glue_kasa.py')}:task=rte,model=large"
    command = parse(config, "--config.adapter.rank=16", "--distributed")
    assert command.config.adapter.rank == 16 and command.config.data.name == "rte"
    assert command.workdir == Path("runs/glue_kasa-task-rte-model-large")
    assert command.distributed
    assert parse("--workdir", "a/b").workdir == Path("a/b")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.adapter.rnak=16", "no such field; nearest: ['adapter.rank'"),
        ("--confg=x.py", "unknown argument '--confg=x.py'; write --config.FIELD=VALUE"),
        ("--work=a", "unknown argument '--work=a'"),
        ("adapter.rank=16", "unknown argument 'adapter.rank=16'"),
        ("--config=configs/quikstart.py", "no file 'configs/quikstart.py'"),
    ],
)
def test_a_mistake_ends_it_with_one_line(capsys, argument, message):
    with pytest.raises(SystemExit) as stopped:
        parse(argument)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

import io
import re

import rich.console

from jaxpeft import runs


def test_plain_lines_where_there_is_no_terminal():
    text = io.StringIO()
    console = rich.console.Console(file=text, width=40)
    with runs.progress(10, done=2, console=console) as bar:
        bar.advance()
        bar.show(4, loss=0.51234, tokens_per_second=12345.6)
        bar.show(10, accuracy=0.9)
        with bar.phase("evaluation", 100) as advance:
            advance(60)
        bar.note("[red] stays as it is")
    first, second, third = text.getvalue().splitlines()
    assert re.fullmatch(r"step 4/10  loss 0.512  .* 12,346  left \d+:\d\d", first)
    assert second.startswith("step 10/10  loss 0.512") and "accuracy 0.9" in second
    assert second.endswith("left 0:00") and third == "[red] stays as it is"


def test_a_bar_in_a_terminal():
    text = io.StringIO()
    console = rich.console.Console(file=text, width=120, force_terminal=True)
    with runs.progress(10, console=console) as bar:
        with bar.phase("evaluation", 100) as advance:
            advance(100)
        bar.show(10, loss=0.25)
    assert "10/10" in text.getvalue() and "loss 0.25" in text.getvalue()
    assert "step 10/10" not in text.getvalue()


def test_a_bar_never_shortens_its_counts():
    text = io.StringIO()
    console = rich.console.Console(file=text, width=80, force_terminal=True)
    with runs.progress(1234, console=console) as bar:
        bar.show(1000, loss=0.25, learning_rate=1e-5, something_else="long " * 20)
        with bar.phase("validation", 100):
            bar.close()
            print("below", file=text)
    assert "1000/1234" in text.getvalue() and "validation" in text.getvalue()
    assert text.getvalue().endswith("below\n")

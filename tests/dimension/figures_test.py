"""Figures are made without a display, with their numbers beside them."""

import csv
import functools

import pytest
from dimension_toolbox import gaussian

from jaxpeft import dimension


def rows(file):
    with file.with_suffix(".csv").open() as read:
        return list(csv.reader(read))


def test_every_figure(tmp_path):
    exact = functools.partial(dimension.twonn, backend="numpy")
    profile = dimension.id_profile([gaussian(d, 6, 60, d) for d in (1, 2, 3)], exact)
    profiles = {"icl-0": profile, "sft": [0.0, 2.5, 3.0]}
    r, _ = dimension.neighbours(gaussian(2, 4, 50, 0), 2, backend="numpy")
    table, _ = dimension.difference_map({"x": profiles}, list(profiles))
    grid = (["0", "1"], ["q", "v"], [[1, 4], [2, None]])
    areas = {"train": [1.0, 2.0], "eval": [1.1, 1.9]}
    draw = {
        "profiles": (profiles,),
        "differences": (table, list(profiles)),
        "dynamics": ({0: profile, 62: profiles["sft"]},),
        "areas": (areas,),
        "against": ([0, 62], {"area": areas, "accuracy": areas}),
        "agreement": ([1.0, 2.0, 3.5], [1.1, 2.2, 3.0]),
        "fit": (r[:, 0], r[:, 1]),
        "scale": ({100: [2.0, 2.1], 50: [1.9, 2.3]},),
        "ranks": (grid,),
    }
    assert {f"plot_{name}" for name in draw} == {
        name for name in dir(dimension) if name.startswith("plot_")
    }
    made = {
        name: getattr(dimension, f"plot_{name}")(*args, tmp_path / f"{name}.png")
        for name, args in draw.items()
    }
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in made.values())
    assert rows(made["profiles"])[1:3] == [
        ["icl-0", str(i), *map(str, (one.dim, one.sd, one.fit, one.poor))]
        for i, one in enumerate(profile[1:], 1)
    ]
    assert rows(made["differences"])[2] == ["icl-0", "sft", str(table[0, 1])]
    assert rows(made["ranks"])[1:] == [
        ["0", "q", "1"],
        ["0", "v", "4"],
        ["1", "q", "2"],
    ]
    assert rows(made["dynamics"])[3:] == [
        ["62", str(i), str(profiles["sft"][i]), "0.0", "nan", "False"] for i in (1, 2)
    ]
    assert len(rows(made["fit"])) == 1 + 45
    scored = tmp_path / "scored.png"
    scores = {"icl-0": (0.5, 0.1), "sft": 0.9}
    dimension.plot_profiles(profiles, scored, scores=scores, title="tiny")
    assert scored.stat().st_size > made["profiles"].stat().st_size
    marked = tmp_path / "marked.png"
    poor = [one._replace(fit=0.5, fit_999=0.1) for one in profile]
    dimension.plot_profiles({"icl-0": poor, "sft": profiles["sft"]}, marked)
    assert [row[-1] for row in rows(marked)[1:3]] == ["True"] * 2
    assert marked.read_bytes() != made["profiles"].read_bytes()
    dimension.plot_ranks(grid, marked, remarks={"1": "poor fit"}, legend={"a": "b"})
    assert marked.read_bytes() != made["ranks"].read_bytes()
    with pytest.raises(ValueError, match=r"`file` must end in .png, got 'x.pdf'"):
        dimension.plot_scale({50: [1.0]}, "x.pdf")

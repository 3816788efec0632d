"""demo.ipynb: its cells run in order, offline, and show what they say.

Neither Jupyter nor nbclient is needed: the code of the cells is run in one fresh namespace, in
which `display` collects the pictures.
"""

import json

import numpy as np
import pytest
from conftest import ROOT

NOTEBOOK = json.loads((ROOT / "demo.ipynb").read_text())


def code_cells():
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def ran():
    """The namespace after all cells, with the pictures shown as "pictures_shown"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        shown = []

        def display(picture, include):
            assert include == ["image/jpeg"]
            shown.append(picture)

        space = {"__name__": "demo", "display": display}
        for cell in code_cells():
            exec("".join(cell["source"]), space)
        space["pictures_shown"] = shown
        yield space
        space["folder"].cleanup()


def test_pictures_show_the_photo_beside_the_maps(ran):
    assert len(ran["pictures_shown"]) == 2
    for picture in ran["pictures_shown"]:
        pixels = np.asarray(picture)
        assert pixels.shape == (260, 8 + 4 * 344, 3)
        for left in range(8, pixels.shape[1], 344):  # no panel is blank
            assert pixels[28:252, left : left + 336].std() > 20


def test_lift_doubles_twice(ran):
    assert ran["coarse"].shape == (1, 192, 14, 21)
    assert ran["lifted"].shape == ran["smooth"].shape == (1, 192, 56, 84)
    assert not ran["lifted"].equal(ran["smooth"])


def test_the_module_trained_is_better_than_bilinear(ran):
    measured = ran["measured"]
    assert measured["photos"] == 16
    assert measured["lift"] > measured["bilinear"] + 0.03


def test_outputs_are_those_of_these_cells(ran):
    """They are stored for readers who run nothing, and name no path of a machine."""
    counts = [cell["execution_count"] for cell in code_cells()]
    assert counts == list(range(1, len(counts) + 1))
    stored = json.dumps([cell["outputs"] for cell in code_cells()])
    assert stored.count("image/jpeg") == len(ran["pictures_shown"])
    assert (ROOT / "demo.ipynb").stat().st_size < 150_000
    assert "/tmp" not in stored and str(ROOT) not in stored
    assert f"LiFT, twice {list(ran['lifted'].shape)}" in stored
    for cell in code_cells():
        assert not any(line.startswith(("!", "%")) for line in cell["source"])

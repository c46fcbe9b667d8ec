"""What a volume's numbers are: said in the config, brought to one orientation, on record; not said, and refused."""

import pytest

from tractkit.core.files import DataError
from tractkit.hdf5.config import read_config

VOLUME = {"type": "volume", "files": ["a.nii.gz", "b.nii.gz"], "standardization": "none"}


@pytest.mark.parametrize("said, problem", [
    ({"features": "vectors"}, "did you mean"),
    ({"features": "sh:descoteux07"}, "did you mean 'sh:descoteaux07'"),
    ({"features": ["scalars", "scalars", "scalars"]}, "3 words for 2 files"),
    ({"features": "peaks"}, "'axes' is missing"),
    ({"features": ["scalars", "sh:tournier07"]}, "'axes' is missing"),
    ({"features": "peaks", "axes": "world"}, "choose voxel, scanner"),
    ({"features": "scalars", "axes": "voxel"}, "'axes' without peaks"),
    ({"axes": "voxel"}, "'axes' without peaks"),
])
def test_what_features_cannot_be_is_one_error(said, problem):
    with pytest.raises(DataError, match=problem) as e:
        read_config({"input": VOLUME | said})
    assert e.value.group == "input"


def test_all_volumes_say_what_they_are_or_none():
    groups = read_config({"input": VOLUME | {"features": ["sh:tournier07", "scalars"], "axes": "scanner"},
                          "streamlines": {"type": "streamlines", "files": "a.trk"}})
    assert groups["input"].features == ("sh:tournier07", "scalars")
    with pytest.raises(DataError, match="other volumes do") as e:
        read_config({"input": VOLUME | {"features": "scalars"}, "mask": VOLUME})
    assert e.value.group == "mask"

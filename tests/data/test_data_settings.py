"""The settings of data, sampler and loader are those of the classes that use them."""

import inspect
import subprocess
import sys

import pytest

from tractkit.core.settings import settings_of
from tractkit.data.dataset import MultiSubjectDataset
from tractkit.data.loader import BatchLoaderOneInput, BatchLoaderSeveralInputs, StreamlinesBatchLoader
from tractkit.data.sampler import BatchIDSampler
from tractkit.data.settings import (
    DatasetSettings,
    LoaderSettings,
    OneInputLoaderSettings,
    SamplerSettings,
    SeveralInputsLoaderSettings,
)
from tractkit.training.config import keywords_of


@pytest.mark.parametrize("cls, settings", [
    (MultiSubjectDataset, DatasetSettings), (BatchIDSampler, SamplerSettings), (StreamlinesBatchLoader, LoaderSettings),
    (BatchLoaderOneInput, OneInputLoaderSettings), (BatchLoaderSeveralInputs, SeveralInputsLoaderSettings)])
def test_a_class_takes_its_settings(cls, settings):
    taken = {k: p.default for k, p in keywords_of(cls).items()}
    said = {k: inspect.Parameter.empty if s.required else s.default for k, s in settings_of(settings).items()}
    assert taken == said
    assert all(s.help for s in settings_of(settings).values())


def test_settings_of_data_load_no_torch():
    code = "import sys, tractkit.data.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

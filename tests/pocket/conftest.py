"""The model that the quickstart tunes, once for all proofs."""

import pytest

import instil


@pytest.fixture(scope="session")
def tuned_folder(tmp_path_factory):
    """Of seed 0."""
    from instil.cli.quickstart import QuickstartOptions, configuration

    options = QuickstartOptions(output=tmp_path_factory.mktemp("quickstart") / "tuned")
    instil.train(configuration(options))
    return options.output

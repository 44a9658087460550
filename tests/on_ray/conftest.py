"""What the tests of replicas on Ray have in common with those of the API."""

from tests.api.conftest import adapter_folders as adapter_folders
from tests.api.conftest import model_folder as model_folder

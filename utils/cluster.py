"""Connection to a Dask cluster, which the flag `scheduler` names."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from utils.errors import InputError

if TYPE_CHECKING:
    from distributed import Client

SECONDS_TO_CONNECT = 60  # for the scheduler, and for its first worker


def imports_this_project() -> bool:
    """True; a process that cannot import this module cannot unpickle the call either."""
    return True


@contextmanager
def cluster(scheduler: str) -> Iterator["Client"]:
    """A client of the Dask scheduler at an address such as tcp://host:8786.

    Raises:
        InputError: nobody answers there, there is no worker, or the cluster cannot import this project.
    """
    from distributed import Client  # a second of imports that other runs need not wait for

    try:
        client = Client(scheduler, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"scheduler={scheduler} cannot be reached ({error}); the address that `dask scheduler` prints is expected"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, SECONDS_TO_CONNECT)
        except TimeoutError as error:
            raise InputError(
                f"scheduler={scheduler} has no worker; `dask worker {scheduler} --nthreads 1` starts one"
            ) from error
        try:
            # The scheduler unpickles calls, too, on their way to a worker.
            client.run_on_scheduler(imports_this_project)
            client.run(imports_this_project)
        except Exception as error:
            raise InputError(
                f"scheduler={scheduler}: its scheduler or a worker cannot import this project ({error}); start both with "
                f"this project's folder as PYTHONPATH and the packages of requirements.lock"
            ) from error
        yield client

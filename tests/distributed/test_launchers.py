"""The place of a process, as SLURM's and Open MPI's variables say it."""

import sys

import pytest

from gpt_jax.distributed.processes import join, place_of
from gpt_jax.errors import UserError

LAUNCHERS = ("SLURM_", "OMPI_", "PMI", "JAX_COORDINATOR", "KUBERNETES_", "TPU_", "CLOUD_TPU")
SLURM = {
    "SLURM_JOB_ID": "8195",
    "SLURM_STEP_NODELIST": "node[007-011,020],big1",
    "SLURM_STEP_NUM_NODES": "7",
    "SLURM_NTASKS": "28",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def launched(monkeypatch):
    """Sets the variables of a launcher, and no other's."""
    import os

    def launch(variables: dict[str, str]) -> None:
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setitem(sys.modules, "mpi4py", None)  # which would look for the launcher itself, and end the process
    return launch


def test_slurm_names_the_first_node_the_number_of_tasks_and_the_own_one(launched):
    launched(SLURM)
    place = place_of("auto")
    assert (place.host_and_port[0], place.count, place.index) == ("node007", 28, 9)
    launched({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert place_of("auto").address == place.address
    launched({**SLURM, "JAX_COORDINATOR_PORT": "4711"})
    assert place_of("auto").address == "node007:4711"


@pytest.mark.parametrize("uri", ["tcp://10.96.0.1,10.148.0.1:34911", "tcp6://[fe80::1,2620:10d::2]:43370"])
def test_open_mpi_names_the_host_of_mpirun(launched, uri):
    launched({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": f"1531576320.0;{uri}"})
    place = place_of("auto")
    assert (place.host_and_port[0], place.count, place.index) == (uri.split("/")[2].split(",")[0].strip("["), 4, 3)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "finds neither SLURM's nor Open MPI's variables: start with srun or mpirun, or give HOST:PORT"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "start with srun"),  # a shell of salloc
        ({**SLURM, "SLURM_PROCID": "x"}, r"cannot read the launcher's variables \(ValueError: .*'x'\): give HOST:PORT"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;usock"}, "cannot read the launcher's variables .*IP address"),
        (
            {name: OPEN_MPI[name] for name in [*OPEN_MPI][1:]},
            r"give HOST:PORT,\$OMPI_COMM_WORLD_SIZE,\$OMPI_COMM_WORLD",
        ),
    ],
)
def test_variables_that_name_no_place_are_said_in_one_line(launched, variables, said):
    launched(variables)
    with pytest.raises(UserError, match=rf"^config\.distributed=auto:? .*{said}|^config\.distributed=auto {said}"):
        join("auto")

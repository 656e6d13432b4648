"""torchrun, with an exit status that says how the ranks ended, and a sentence instead of a traceback.

Takes torchrun's flags: --standalone --nproc-per-node=8 -m experiments.gpt2_124m
Exit status: 0 done. 2 a user's mistake, which is not tried again. 128 + N ended by signal N. Otherwise that
of the first rank that failed after all restarts were used up.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError


def main(arguments: list[str]) -> int:
    """Runs the ranks of this machine to their end and returns the exit status for it."""
    # torchrun would set one thread too, but warn about it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Time for the checkpoint that ranks save after a signal; torchrun's default is 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    # Ranks say themselves why they ended; torchrun would only add its signals and that a status was not 0.
    logging.disable(logging.ERROR)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if status != 2:  # the ranks have explained a mistake
            print(
                f"error: rank {rank} ended with status {failure.exitcode}, and no restart is left",
                file=sys.stderr,
            )
        return status
    except SignalException as stop:
        # A rank ends this process with SIGQUIT after a mistake of the user: nanogpt.meeting.stop_restarts.
        return 2 if stop.sigval == signal.SIGQUIT else 128 + stop.sigval
    except (RendezvousError, DistError) as error:  # the latter if --master-port is taken
        print(
            f"error: the machines did not meet ({error}); start the same command on each, and look at the "
            f"address, the port (it may be taken) and the firewall",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""torchrun, ending in a status that says how the ranks ended, and in a sentence instead of a traceback.

Takes torchrun's flags: --standalone --nproc-per-node=8 -m experiments.gpt2_124m
Exit status: 0 done. 2 a mistake of the user, which is not tried again. 128 + N ended by signal N. Else that
of the first rank that failed, restarts used up.
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
    # torchrun's own default is one thread, and a warning about it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # For the checkpoint that ranks save after a signal; of torchrun's own accord it is 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    # Ranks say themselves why they ended; torchrun adds which signals it sends and that a status was not 0.
    logging.disable(logging.ERROR)
    try:
        run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        if status != 2:  # a mistake has been explained by the ranks
            print(
                f"error: rank {rank} ended with status {failure.exitcode}, and no restart is left",
                file=sys.stderr,
            )
        return status
    except SignalException as stop:
        # A rank ends this process with SIGQUIT after a mistake of the user: nanogpt.meeting.stop_restarts.
        return 2 if stop.sigval == signal.SIGQUIT else 128 + stop.sigval
    except (RendezvousError, DistError) as error:  # the latter with --master-port, where it is taken
        print(
            f"error: the machines did not meet ({error}); start the same command on each, and look at the "
            f"address, the port (it may be taken) and the firewall",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

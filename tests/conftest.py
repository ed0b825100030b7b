import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
# threads of two processes at once fight, and slow both tenfold: give OMP_NUM_THREADS=1 beside other work
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

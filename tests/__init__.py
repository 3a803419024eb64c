from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA_FOLDER = ROOT / "tests" / "data"

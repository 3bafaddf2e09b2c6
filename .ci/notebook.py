"""`python .ci/notebook.py docs/guides/quickstart.ipynb`: runs it and writes its outputs into it, without times."""

import sys

import nbformat
from nbclient import NotebookClient

file = sys.argv[1]
notebook = nbformat.read(file, as_version=4)
NotebookClient(notebook, coalesce_streams=True, record_timing=False, timeout=300).execute()
nbformat.write(notebook, file)

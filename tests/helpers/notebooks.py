"""A program that runs a notebook: what to run, where to write it, and the folder to run in."""

# in a process of its own, for the client leaves sockets to the garbage collector
EXECUTE = """
import sys, nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
given, out, folder = sys.argv[1:]
notebook = nbformat.read(given, as_version=4)
# the kernel of this environment, whatever other kernels the machine has
manager = KernelManager(kernel_name="python3")
resources = {"metadata": {"path": folder}}
NotebookClient(notebook, km=manager, timeout=300, resources=resources).execute()
nbformat.write(notebook, out)
"""

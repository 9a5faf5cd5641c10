"""The project's scripts. This file is here so that no installed package of the name comes first."""

"""Other frameworks, one file each; a file is imported only by who has the framework."""

from tikhon.integrations.readings import readings

__all__ = ["readings"]

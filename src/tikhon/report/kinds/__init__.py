"""Page builders by kind of run: `SavedRun -> Page`. A new kind takes a file and an entry."""

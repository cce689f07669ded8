"""One page builder a kind of run: `SavedRun -> Page`. A new kind is one file and one line here."""

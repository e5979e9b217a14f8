"""Practice beyond the exercises: sessions under practice/, which the watch judges too; and help when stuck."""

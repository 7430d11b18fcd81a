"""What runs beside a worker; imports the standard library only, since it starts with every rank."""

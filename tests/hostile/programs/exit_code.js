// expect: error
process.exit(300);

// expect: killed|error
process.abort();

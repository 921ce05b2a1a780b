// expect: outputLimit
const {writeSync} = require("fs"); for (;;) writeSync(1, "x".repeat(65536));

// expect: processLimit|memoryLimit|error|killed|timeout
const {Worker} = require("worker_threads"); for (let n = 0; n < 500; n++) new Worker("for(;;);", {eval: true});

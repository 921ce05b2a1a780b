// expect: memoryLimit|killed|error
const a = []; for (;;) a.push({a: [a.length]});

// expect: memoryLimit|killed|error
const a = []; for (;;) a.push(new Uint8Array(1 << 22).fill(1));

// expect: timeout
setInterval(() => {}, 1000);

// expect: error
Promise.reject(new Error("nobody cares"));

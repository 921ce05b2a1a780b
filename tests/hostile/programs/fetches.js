// expect: ok out=refused
fetch("http://127.0.0.1:8080/").then(() => console.log("open"), () => console.log("refused"));

// What the tests of the report ask of its page. Each test adds a call of one of these functions.

// The texts of one column of a table, from top to bottom, in a list for each body; head is a cell of the table's head.
function columnTexts(id, head) {
  const bodies = [...document.querySelectorAll(`#${id} tbody`)];
  const rows = body => [...body.rows].filter(row => row.className !== "head");
  return bodies.map(body => rows(body).map(row => row.cells[head.cellIndex].textContent.trim()));
}

// Whether all elements that a selector matches end within the window.
function fits(selector) {
  const elements = [...document.querySelectorAll(selector)];
  return elements.every(element => element.getBoundingClientRect().right <= innerWidth);
}

function widths(selector) {
  return [...document.querySelectorAll(selector)].map(element => element.clientWidth);
}

// The beginning and the colour of every text.
function textColours() {
  const holdsText = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const elements = [...document.querySelectorAll("body *:not(script)")].filter(holdsText);
  return elements.map(element => {
    const style = getComputedStyle(element);
    return [element.textContent.trim().slice(0, 40), element.tagName === "text" ? style.fill : style.color];
  });
}
